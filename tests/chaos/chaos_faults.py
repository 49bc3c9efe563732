"""Faults other than kills: a full disk, no memory, clocks that jump, NaN.

A fault befalls one process of a run when it enters a phase. The run may end well, or with one sentence and a code of
docs/operate.md. Taken up without the fault, it must end with the bytes of an unbroken run; after NaN in a step it
may also end with the step skipped, counted and every figure finite.
"""

from __future__ import annotations

import gc
import random
import resource
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
    """What befalls a process of a run when it enters a phase."""

    kind: str
    phase: str
    seed: int
    processes: int = 1
    outcome: str = ""

    @property
    def name(self) -> str:
        return f"{self.kind} at {self.phase}" + (f", process {self.victim} of 2" if self.processes > 1 else "")

    @property
    def victim(self) -> int:
        return self.seed % self.processes

    def examine(self, command: Command, watch: Watch) -> list[str]:
        """Breaks a run and says what was not as promised."""
        strikes = {self.phase: lambda: KINDS[self.kind][0](random.Random(f"{self.kind} {self.seed}"))}
        code = command.end(started := command.start(watch, resume=False, strikes=strikes, victim=self.victim))
        self.outcome = f"ended with {code}"
        problems = [started.stuck] if started.stuck else []
        # Where memory ends inside a library's C++, the process ends by SIGABRT.
        crashed = self.kind == "no memory" and any(code < 0 for code in started.codes.values())
        return problems + ([] if crashed else command.unlike(code))


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
    for model in [found for found in gc.get_objects() if isinstance(found, LlamaForCausalLM)]:
        name, parameter = draw.choice([pair for pair in model.named_parameters() if pair[1].numel()])
        with torch.no_grad():
            parameter.view(-1)[draw.randrange(parameter.numel())] = float("nan")


KINDS: dict[str, tuple[Callable[[random.Random], None], tuple[str, ...]]] = {
    "full disk": (_full_disk, RUNNING),
    "no memory": (_no_memory, RUNNING),
    "clock jumps": (_clock_jumps, RUNNING),
    "NaN in an output": (_nan_in_output, COMPUTING),
    "NaN in a gradient": (_nan_in_gradient, LEARNING),
    "NaN in a weight": (_nan_in_weight, COMPUTING),
}
PAIRED = ("full disk", "no memory", "NaN in an output", "NaN in a gradient", "NaN in a weight")


def faults(share: float, draw: random.Random) -> list[Fault]:
    """Each kind in each of its phases, those of PAIRED in two processes too; or a share of them, drawn."""
    found = [
        Fault(kind, phase, draw.randrange(1 << 30), processes)
        for kind, (_, phases) in KINDS.items()
        for processes in ((1, 2) if kind in PAIRED else (1,))
        for phase in phases[:: 1 if processes == 1 else 2]
    ]
    return found if share >= 1 else draw.sample(found, round(share * len(found)))


def skipped(fault: Fault, command: Command) -> bool:
    """Whether the run says of itself that it skipped the steps that met NaN, and all of its figures are finite."""
    summary = command.summary
    counted = summary.get("skipped_steps", 0) + summary.get("skipped_decision_steps", 0)
    return "NaN" in fault.kind and counted > 0 and not list(non_finite_figures(summary))
