"""A run on a device that notices who waits for it: no LoRA step does, a decision reads its mask, a log its figures."""

from collections import Counter
from contextlib import contextmanager, nullcontext

import pytest
import torch
from accelerate import Accelerator
from stand_in_device import DEVICE, NAME, StandIn
from tiny_run import make

from atp.models import attention
from atp.training.callbacks import Callback
from atp.training.trainer import ATPTrainer
from atp_kernels import KeptFirst, KeptSlice, kept_lora_linear

pytestmark = pytest.mark.slow

PHASES = {"open": 2, "search": 3, "settle": 2, "tune": 2}
TOTAL = sum(PHASES.values())
MASK = ("read", "aten::_to_copy", "decisions.py")


@pytest.fixture
def device(monkeypatch):
    monkeypatch.setattr(Accelerator, "device", property(lambda self: DEVICE))
    monkeypatch.setattr(attention, "FUSED_ON", (NAME,))  # as on CUDA
    with StandIn() as device:
        yield device


class Waits(Callback):
    """Lists the waits of each step, from loading its data to its log; those of its decision apart.

    Logs, guards and checkpoints wait by design: they are called every `log_every` and `save_every` steps.
    """

    def __init__(self, device, monkeypatch):
        self.device, self.decisions, self.steps, self.operators = device, {}, {}, []
        for name in ("_log", "check", "checkpoint", "write"):
            monkeypatch.setattr(ATPTrainer, name, self.meant(getattr(ATPTrainer, name)))

    def meant(self, function):
        def call(*arguments):
            with self.device.allowed():
                return function(*arguments)

        return call

    @contextmanager
    def of(self, trainer):
        decide = trainer.pruning.decide

        def decided(step):
            decide(step)
            self.decisions[trainer.step], self.device.waits = Counter(self.device.waits), []

        trainer.pruning.decide = decided
        run = trainer.run

        def watched(*arguments, **options):
            with self.device.watching():
                run(*arguments, **options)

        trainer.run = watched
        yield

    def on_step(self, loop, record):
        self.steps[loop.step - 1], self.device.waits = Counter(self.device.waits), []
        self.operators.append(self.device.operators)
        self.device.operators = 0


def run(folder, device, monkeypatch, **overrides):
    """Runs all phases; returns what was waited for."""
    waits = Waits(device, monkeypatch)
    training = {**PHASES, "log_every": 1, "save_every": 100} | overrides.pop("training", {})
    settings = {"space": "kv_group", "refit_windows": 2, "saliency_windows": 2} | overrides.pop("decisions", {})
    trainer = make(folder, callbacks=[waits], training=training, decisions=settings, **overrides)
    with waits.of(trainer):
        trainer.train()
    assert {p.device.type for p in trainer.model.parameters()} == {NAME}
    assert len(waits.operators) == TOTAL and min(waits.operators) > 500
    return waits


READS = [
    lambda x: x.sum().item(), lambda x: bool(x.any()), lambda x: float(x[0]), lambda x: x[x > 1],
    lambda x: x.nonzero(), lambda x: torch.equal(x, x), lambda x: int(x.argmax()), lambda x: x.cpu(),
    lambda x: x.to("cpu", non_blocking=True), lambda x: torch.zeros(3).copy_(x), lambda x: x.masked_select(x > 1),
    lambda x: x.unique(),
]  # fmt: skip
UPLOADS = [
    lambda x: torch.arange(3).to(DEVICE), lambda x: torch.tensor([1.0], device=DEVICE), lambda x: x[torch.tensor([1])],
    lambda x: x.copy_(torch.ones(3)),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "works"), [("read", READS), ("upload", UPLOADS)])
def test_the_device_notices_every_kind_of_wait(device, kind, works):
    for work in works:
        x, device.waits = torch.arange(3.0).to(DEVICE), []
        with device.watching():
            work(x)
        assert {found for found, *_ in device.waits} == {kind}


CASES = {
    "learned, exact budget, dropout": {"lora": {"dropout": 0.1}, "data": {"packing": "separate"}},
    "learned, penalty, l0, bfloat16": {
        "decisions": {"budget": "penalty", "generator": "free"},
        "training": {"precision": "bfloat16", "regularizer": "l0"},
        "lora": {"dropout": 0.0},
    },
    "running saliency": {
        "decisions": {"source": "running"},
        "training": {"precision": "bfloat16", "update_clipping": True},
    },
    "saliency, equal layers, checkpointing": {
        "decisions": {"source": "tuned", "uniform": True},
        "training": {"gradient_checkpointing": True, "gradient_accumulation": 2},
    },
    "head_dim, where sides keep their order": {"decisions": {"space": "head_dim"}},
    "disp, running saliency": {"decisions": {"space": "disp", "source": "running"}},
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_steps_wait_for_nothing_and_decisions_read_once(tmp_path, device, monkeypatch, case):
    waits = run(tmp_path, device, monkeypatch, **CASES[case])
    assert waits.steps == dict.fromkeys(range(TOTAL), Counter())
    for found in waits.decisions.values():
        assert [(kind, name, place.split(":")[0].rsplit("/", 1)[-1]) for kind, name, place in found] == [MASK]
        assert set(found.values()) == {1}
    assert list(waits.decisions) == [2, 3, 4]


def linear_of_slices(place, counted_on, order, watching=nullcontext):
    """y of a LoRA linear and its gradients, with outputs gathered or kept first and inputs in their place."""
    rng = torch.Generator().manual_seed(0)
    shapes = (5, 70), (90, 70), (2, 70), (90, 2), (90,)
    x, weight, lora_a, lora_b, bias = (torch.randn(shape, generator=rng).to(place) for shape in shapes)
    outs, ins = ((torch.rand(n, generator=rng) < keep).to(counted_on) for n, keep in ((90, 0.4), (70, 0.9)))
    leaves = [leaf.requires_grad_() for leaf in (x, lora_a, lora_b)]
    with watching():
        side = KeptFirst(outs, device=place) if order else outs
        kept = KeptSlice(weight, bias, out_mask=side, in_mask=ins)
        y = kept_lora_linear(x, kept, lora_a, lora_b, scaling=0.5)
        y.square().sum().backward()
    assert {part.device.type for part in (kept.sides[0].index, kept.sides[0].place)} == {torch.device(place).type}
    return [tensor.detach().cpu() for tensor in (y, *(leaf.grad for leaf in leaves))]


@pytest.mark.parametrize("order", [False, True], ids=["in the order of the model", "kept first"])
def test_slices_of_masks_on_the_host_wait_for_nothing_and_compute_the_same(device, order):
    expected = linear_of_slices("cpu", "cpu", order)
    on_host = linear_of_slices(DEVICE, "cpu", order, device.watching)
    assert device.waits == [] and device.uploads == 2
    on_device = linear_of_slices(DEVICE, DEVICE, order, device.watching)
    assert {kind for kind, *_ in device.waits} == {"read"}
    for results in (on_host, on_device):
        # Where memory is aligned differently, BLAS may round differently.
        torch.testing.assert_close(results, expected, rtol=1e-6, atol=1e-4)


def test_a_planted_read_is_found(tmp_path, device, monkeypatch):
    """In the log's place it is allowed, one line above it is not."""
    clip = ATPTrainer.clip

    def clip_and_look(loop):
        clip(loop)
        if loop.step == TOTAL - 1:
            loop.adamw.param_groups[0]["params"][0].grad.norm().item()

    monkeypatch.setattr(ATPTrainer, "clip", clip_and_look)
    waits = run(tmp_path, device, monkeypatch)
    expected = ("read", "aten::_local_scalar_dense", f"{__file__}:{clip_and_look.__code__.co_firstlineno + 3}")
    assert waits.steps.pop(TOTAL - 1) == Counter([expected])
    assert not any(waits.steps.values())
