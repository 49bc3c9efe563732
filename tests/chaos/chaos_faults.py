"""Faults other than kills: a full disk, no memory, clocks that jump, NaN, changed inputs, a second writer.

A fault befalls one process of a run when it enters a phase. The run may end well, or with one sentence and a code of
docs/operate.md. Taken up without the fault, it must end with the bytes of an unbroken run; after NaN in a step it
may also end with the step skipped, counted and every figure finite.
"""

from __future__ import annotations

import gc
import os
import random
import resource
import shutil
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from chaos_command import PHASES, Command, Watch
from torch import nn
from transformers import LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from atp.processes.finite import non_finite_figures

RUNNING = PHASES[3:]
COMPUTING = tuple(phase for phase in RUNNING if phase not in ("checkpoint", "report"))
LEARNING = ("dense baseline", "open", "saliency", "search", "settle", "tune")


@dataclass
class Fault:
    """What befalls a run, in which phase; `examine` does it and says what was not as promised."""

    kind: str
    phase: str
    examine: Callable[[Fault, Command, Watch], list[str]]
    seed: int
    processes: int = 1
    outcome: str = ""

    @property
    def name(self) -> str:
        return f"{self.kind} at {self.phase}" + (f", process {self.victim} of 2" if self.processes > 1 else "")

    @property
    def victim(self) -> int:
        return self.seed % self.processes

    @property
    def draw(self) -> random.Random:
        return random.Random(f"{self.kind} {self.seed}")


def _struck(blow: Callable[[random.Random], None], *, may_crash: bool = False):
    """Examines a fault that a process meets when it enters the phase."""

    def examine(fault: Fault, command: Command, watch: Watch) -> list[str]:
        strikes = {fault.phase: lambda: blow(fault.draw)}
        code = command.end(started := command.start(watch, resume=False, strikes=strikes, victim=fault.victim))
        fault.outcome = f"ended with {code}"
        problems = [started.stuck] if started.stuck else []
        # Where memory ends inside a library's C++, the process ends by SIGABRT.
        crashed = may_crash and any(code < 0 for code in started.codes.values())
        return problems + ([] if crashed else command.unlike(code))

    return examine


def _full_disk(draw: random.Random) -> None:
    """No file grows beyond a few bytes or kilobytes any more. A limit, because a disk cannot be filled everywhere."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    size = draw.choice((0, 0, 100, 1 << draw.randrange(9, 18)))
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


def _no_memory(draw: random.Random) -> None:
    with open("/proc/self/statm") as file:
        size = int(file.read().split()[0]) * resource.getpagesize() + draw.choice((0, 1 << 16, 1 << 20, 1 << 23))
    resource.setrlimit(resource.RLIMIT_AS, (size, size))


def _clock_jumps(draw: random.Random) -> None:
    """Back to 1970, on by a year, or back by a day: as the first clock set from the network does it."""
    clock, clock_ns = time.time, time.time_ns
    jump = draw.choice((1e3 - clock(), 365 * 86_400.0, -86_400.0))
    time.time, time.time_ns = lambda: clock() + jump, lambda: clock_ns() + int(jump * 1e9)


def _nan_in_output(draw: random.Random) -> None:
    """The output of a decoder layer, once: what a fault of the device does to a forward pass, a loss or a score."""
    _spoil_once(draw, lambda output: output * float("nan"))


def _nan_in_gradient(draw: random.Random) -> None:
    """The gradient of a decoder layer's output, once."""

    def spoil(output):
        if output.requires_grad:
            output.register_hook(lambda gradient: gradient * float("nan"))
        return output

    _spoil_once(draw, spoil)


def _spoil_once(draw: random.Random, spoil: Callable) -> None:
    calls = draw.randrange(1, 5)

    def hook(module: nn.Module, inputs, output):
        nonlocal calls
        if not isinstance(module, LlamaDecoderLayer):
            return None
        calls -= 1
        if calls:
            return None
        hooked.remove()
        return spoil(output) if torch.is_tensor(output) else (spoil(output[0]), *output[1:])

    hooked = nn.modules.module.register_module_forward_hook(hook)


def _nan_in_weight(draw: random.Random) -> None:
    """One element of one parameter of every model in memory."""
    for model in [found for found in gc.get_objects() if isinstance(found, LlamaForCausalLM)]:
        name, parameter = draw.choice([pair for pair in model.named_parameters() if pair[1].numel()])
        with torch.no_grad():
            parameter.view(-1)[draw.randrange(parameter.numel())] = float("nan")


def _changed_inputs(fault: Fault, command: Command, watch: Watch) -> list[str]:
    """A run is killed, an input changes, --resume refuses unless it is the same data; the input is put back."""
    started = command.start(watch, resume=False, strikes={fault.phase: lambda: os.kill(os.getpid(), signal.SIGKILL)})
    command.end(started)
    inputs, draw = command.config.parent / "inputs", fault.draw
    kind = draw.choice(sorted(_CHANGES))
    kept = shutil.copytree(inputs, command.folder.with_name(f"{command.folder.name}-inputs"))
    try:
        overrides = _CHANGES[kind](inputs, draw)
        code = command.finish(watch, resume=True, overrides=overrides)
    finally:
        shutil.rmtree(inputs)
        shutil.move(kept, inputs)
    fault.outcome = f"{kind}: ended with {code}"
    expected = 0 if kind == _REORDERED else 2
    return command.unlike(code) if code == expected else [f"{kind} ended with {code}: {command.said[-500:]}"]


def _edit(name: str, change: Callable[[bytes, random.Random], bytes]):
    def edit(inputs, draw):
        path = inputs / name
        path.write_bytes(change(path.read_bytes(), draw))
        return ()

    return edit


def _another_weight(content: bytes, draw: random.Random) -> bytes:
    """The sign of a weight in the last tensors of the file."""
    place = len(content) - 1 - 4 * draw.randrange(1000)
    return content[:place] + bytes([content[place] ^ 0x80]) + content[place + 1 :]


_REORDERED = "rows of data in another order"  # the order of the splits comes from what the documents say
_CHANGES = {
    "a row of data changed": _edit("data.jsonl", lambda content, draw: content.replace(b"heart", b"rate", 1)),
    "a row of data added": _edit("data.jsonl", lambda content, draw: content + b"\n" + content.splitlines()[0]),
    _REORDERED: _edit("data.jsonl", lambda c, draw: b"\n".join(c.splitlines()[::-1])),
    "a weight changed": _edit("model.safetensors", _another_weight),
    "the model's config changed": _edit(
        "config.json", lambda content, draw: content.replace(b'"rms_norm_eps": 1e-06', b'"rms_norm_eps": 1e-05')
    ),
    "two words of the tokenizer exchanged": _edit(
        "tokenizer.json",
        lambda c, draw: c.replace(b'"heart"', b'"@"').replace(b'"rate"', b'"heart"').replace(b'"@"', b'"rate"'),
    ),
    "another learning rate": lambda inputs, draw: ("training.lr=0.004",),
    "another seed": lambda inputs, draw: ("seed=1",),
    "another budget": lambda inputs, draw: ("decisions.target_keep=0.7",),
}


def _two_writers(fault: Fault, command: Command, watch: Watch) -> list[str]:
    """A second process of the same command starts while the first is in the phase; it must be sent away."""
    first = command.start(watch, resume=False, strikes={fault.phase: lambda: os.kill(os.getpid(), signal.SIGSTOP)})
    while first.running and not _stopped(first.children[0]):
        time.sleep(2e-3)
    second = Command(command.config, command.folder)
    code = second.finish(Watch(), resume=fault.draw.random() < 0.7)
    problems = second.unlike(code) if code == 2 else [f"the second ended with {code}: {second.said[-500:]}"]
    first.send_all("SIGCONT")
    code = command.end(first)
    fault.outcome = f"the second was sent away, the first ended with {code}"
    return problems + ([] if code == 0 else [f"the first ended with {code}: {command.said[-500:]}"])


def _stopped(process: int) -> bool:
    with open(f"/proc/{process}/stat") as file:
        return file.read().rpartition(")")[2].split()[0] == "T"


KINDS: dict[str, tuple[Callable[[Fault, Command, Watch], list[str]], tuple[str, ...]]] = {
    "full disk": (_struck(_full_disk), RUNNING),
    "no memory": (_struck(_no_memory, may_crash=True), RUNNING),
    "clock jumps": (_struck(_clock_jumps), RUNNING),
    "NaN in an output": (_struck(_nan_in_output), COMPUTING),
    "NaN in a gradient": (_struck(_nan_in_gradient), LEARNING),
    "NaN in a weight": (_struck(_nan_in_weight), COMPUTING),
    "changed inputs": (_changed_inputs, RUNNING[:-1]),  # from the report on it is finished, and left as it is
    "two writers": (_two_writers, RUNNING),
}
PAIRED = ("full disk", "no memory", "NaN in an output", "NaN in a gradient", "NaN in a weight")


def faults(share: float, draw: random.Random) -> list[Fault]:
    """Each kind in each of its phases, those of PAIRED in two processes too; or a share of them, drawn."""
    found = [
        Fault(kind, phase, examine, draw.randrange(1 << 30), processes)
        for kind, (examine, phases) in KINDS.items()
        for processes in ((1, 2) if kind in PAIRED else (1,))
        for phase in phases[:: 1 if processes == 1 else 2]
    ]
    return found if share >= 1 else draw.sample(found, round(share * len(found)))


def skipped(fault: Fault, command: Command) -> bool:
    """Whether the run says of itself that it skipped the steps that met NaN, and all of its figures are finite."""
    summary = command.summary
    counted = summary.get("skipped_steps", 0) + summary.get("skipped_decision_steps", 0)
    return "NaN" in fault.kind and counted > 0 and not list(non_finite_figures(summary))
