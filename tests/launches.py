"""Which Triton kernels a run launches on a GPU, found without one.

    python tests/launches.py default                     a run as a config without a word on decisions makes it
    python tests/launches.py learned --capability 80     search, settle, group lasso, on another GPU generation

Triton is told of a driver whose device has the given CUDA capability. The wrappers of all backends launch into it, on
the stand-in device of tests/atp/training: each launch is specialised and compiled to machine code as on that GPU, and
noted. Nothing runs it. What a call returns is computed by the `reference` backend, so the run goes on with true values.

Prints JSON: a list of launches in their order, as `Launch`.
"""

import argparse
import inspect
import json
import os
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from types import ModuleType

os.environ.pop("TRITON_INTERPRET", None)  # which would leave nothing to compile
ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "atp" / "training")]

import torch  # noqa: E402
import triton  # noqa: E402
from accelerate import Accelerator  # noqa: E402
from stand_in_device import DEVICE, NAME, StandIn  # noqa: E402
from tiny_run import make  # noqa: E402
from torch.utils._pytree import tree_map_only  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import CompiledKernel  # noqa: E402
from triton.runtime import JITFunction  # noqa: E402

import atp_kernels  # noqa: E402
from atp.models import attention  # noqa: E402
from atp.training.trainer import ATPTrainer  # noqa: E402
from atp_kernels import call, triton_runtime  # noqa: E402
from atp_kernels.linear import descriptors  # noqa: E402


@dataclass(frozen=True)
class Launch:
    """One launch. phase: that of the run, or `score`, `freeze` (with the refit) or `cut` (with its certificate)."""

    phase: str
    kernel: str
    grid: tuple[int, ...]
    arguments: dict[str, str]
    options: dict[str, object]
    shared: int


class Driver:
    """A CUDA device of some capability, as far as Triton asks before it loads a kernel."""

    def __init__(self, capability):
        self.target = GPUTarget("cuda", capability, 32)

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 0

    def get_current_target(self):
        return self.target


class Recorder:
    """Notes launches; makes this process take its stand-in device for a GPU."""

    def __init__(self, capability):
        self.launches, self.phase, self.capability = [], "none", capability
        triton.runtime.driver.set_active(Driver(capability))
        CompiledKernel.run = property(lambda kernel: lambda *arguments: None)
        CompiledKernel.launch_metadata = lambda kernel, *arguments: None
        self.run, self.select = JITFunction.run, call._select
        recorder = self
        JITFunction.run = lambda kernel, *args, grid, warmup, **options: recorder.note(kernel, args, grid, options)
        triton_runtime.REASON, triton_runtime.AVAILABLE = None, True
        triton_runtime.misfit = lambda device: None
        call._select = self._selected
        descriptors.generation = lambda device: capability
        descriptors._programs = lambda device: 132
        Accelerator.device = property(lambda accelerator: DEVICE)
        attention.FUSED_ON = attention.UNGROUPED_ON = (NAME,)

    def note(self, kernel, args, grid, options):
        compiled = self.run(kernel, *args, grid=grid, warmup=False, **options)
        given = inspect.signature(kernel.fn).bind(*args, **{k: v for k, v in options.items() if k in kernel.arg_names})
        kinds = {name: _kind(value) for name, value in given.arguments.items()}
        rest = {name: value for name, value in options.items() if name not in kernel.arg_names}
        launch = Launch(self.phase, kernel.__name__, tuple(grid), kinds, rest, compiled.metadata.shared)
        self.launches.append(launch)
        return compiled

    def _selected(self, op, device, *rest):
        """The backend that takes a call on CUDA; one of Triton launches, and the reference's results are returned."""
        # A custom operator is given the values of the stand-in, which lie on the host.
        ours = device.type == NAME or op == "cross_entropy_"
        choice = self.select(op, torch.device("cuda", 0) if ours else device, *rest)
        if not ours or choice.name == "reference":
            return choice
        reference, _ = call.OPERATIONS[op].load("reference")
        if choice.name != "triton":  # the extension's kernels do not know the stand-in
            return choice._replace(module=reference)
        return choice._replace(module=_launched(choice.module, reference))


def _kind(value):
    """An argument as its specialization sees it; a descriptor by its tile."""
    if hasattr(value, "block_shape"):
        return f"{value.base.dtype} {value.block_shape}"
    return str(value.dtype) if hasattr(value, "dtype") else repr(value)


def _launched(backend, reference):
    """A module whose functions call those of a backend on copies and return what those of the reference do."""

    def both(launch, compute):
        def function(*args, **options):
            copies = tree_map_only(torch.Tensor, torch.clone, (args, options)) if _writes(launch) else (args, options)
            with torch.no_grad():
                launch(*copies[0], **copies[1])
            return compute(*args, **options)

        return function

    module = ModuleType(backend.__name__)
    for name, value in vars(backend).items():
        theirs = getattr(reference, name, None)
        ours = inspect.isfunction(value) and value.__module__ == backend.__name__ and inspect.isfunction(theirs)
        setattr(module, name, both(value, theirs) if ours else value)
    return module


def _writes(function):
    return function.__name__.endswith("_") or function.__name__ == "gated_backward"


def of_run(name, recorder, folder):
    """Trains and cuts a tiny model of widths that whole tiles have, in bfloat16."""
    sizes = {"hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 4, "num_key_value_heads": 2}
    training = {"batch_size": 1, "precision": "bfloat16", "save_every": 100}
    decisions = {"space": "kv_group", "refit_windows": 2, "saliency_windows": 2}
    if name == "default":
        training |= {"open": 3, "search": 0, "settle": 0, "tune": 3}
        decisions |= {"source": "running"}
    else:
        training |= {"open": 1, "search": 4, "settle": 2, "tune": 1}
        decisions |= {"source": "learned", "space": "head_dim"}
    dropout = 0.0 if name == "default" else 0.1
    trainer = make(
        folder, sizes=sizes, training=training, decisions=decisions, lora={"r": 8, "alpha": 8, "dropout": dropout},
        dtype=torch.bfloat16,
    )  # fmt: skip
    phases = {"_score": "score", "_freeze": "freeze", "_cut": "cut"}
    for method, phase in phases.items():
        _marked(recorder, method, lambda *arguments, phase=phase: phase)
    _marked(recorder, "run", lambda phase, *arguments: phase)
    trainer.train()


def _marked(recorder, method, phase_of):
    original = getattr(ATPTrainer, method)

    def marked(trainer, *arguments, **options):
        before, recorder.phase = recorder.phase, phase_of(*arguments)
        try:
            return original(trainer, *arguments, **options)
        finally:
            recorder.phase = before

    setattr(ATPTrainer, method, marked)


def of_calls(recorder):
    """Calls of the operations that a run has no use for, and of the kernels of tensor descriptors."""
    recorder.phase = "calls"
    values = lambda *shape, **options: torch.randn(*shape, dtype=torch.bfloat16, **options).to(DEVICE)  # noqa: E731
    x, weight, low, high = values(64, 256), values(256, 256), values(8, 256), values(256, 8)
    mask = (torch.arange(256) % 3 > 0).to(DEVICE)
    for tensor in (x, low, high):
        tensor.requires_grad_()
    gain = torch.ones(256).to(DEVICE).requires_grad_()
    wide = values(64, 16384).requires_grad_(), torch.ones(16384).to(DEVICE).requires_grad_()
    for rows, scale in ((x, gain), wide):
        atp_kernels.rms_norm(rows, scale, eps=1e-5).float().sum().backward()
    for width in (16, 256):
        linear = atp_kernels.Projection(weight[:width], low, high[:width], 1.0)
        back = atp_kernels.Projection(weight[:, :width].contiguous(), low[:, :width], high, 1.0)
        atp_kernels.masked_lora_swiglu(x, linear, linear, back, mask=mask[:width].float()).float().sum().backward()
    atp_kernels.lora_dropout(x, 0.1, 7)
    atp_kernels.cross_entropy_(values(64, 300), torch.arange(64).to(DEVICE))
    if recorder.capability >= 90:
        tiles = atp_kernels.linear.tiles.descriptor_tiles(torch.bfloat16, recorder.capability)
        for tile in tiles:
            os.environ[atp_kernels.linear.tiles.TILE_VARIABLE] = tile
            y = atp_kernels.masked_lora_linear(x, weight, low, high, scaling=1.0, out_mask=mask, in_mask=mask)
            y.float().sum().backward()
        del os.environ[atp_kernels.linear.tiles.TILE_VARIABLE]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", choices=("default", "learned", "calls"))
    parser.add_argument("--capability", type=int, choices=(80, 90, 100, 120), default=90)
    options = parser.parse_args()
    recorder = Recorder(options.capability)
    with tempfile.TemporaryDirectory() as folder, StandIn():
        if options.run == "calls":
            of_calls(recorder)
        else:
            of_run(options.run, recorder, Path(folder))
    print(json.dumps([asdict(launch) for launch in recorder.launches]))


if __name__ == "__main__":
    main()
