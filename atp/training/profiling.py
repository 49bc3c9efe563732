"""`atp train --profile`: where the time of a step goes, phase by phase.

A few steps of each phase run under torch's profiler. Every operator's own time is put under one heading: by the scope
it ran in (`scope` marks loss, masks and data, hooks mark norms and attention, torch marks optimizer and data loader),
by its name for matrix products and fused attention, and in the backward pass by what its forward operator was.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.autograd import DeviceType
from torch.autograd.profiler_util import FunctionEvent
from torch.profiler import ProfilerActivity, profile, record_function

from atp.ground.files import whole_file, write_json, write_text
from atp.training.callbacks import Callback, Record

if TYPE_CHECKING:
    from atp.training.loop import Loop

HEADINGS = ("matmul", "attention", "norm", "loss", "optimizer", "masks", "data", "other")
_MARK = "atp::"
_BACKWARD = "autograd::engine::evaluate_function: "
_WHOLE = ("loss", "optimizer", "data")  # all that happens in these scopes is theirs, matrix products too
_SCOPES = {"Optimizer.": "optimizer", "enumerate(DataLoader)": "data", "atp_kernels::": "masks"}
_OPERATORS = {
    "aten::mm": "matmul", "aten::addmm": "matmul", "aten::bmm": "matmul", "aten::baddbmm": "matmul",
    "aten::mkldnn_linear": "matmul", "atp_kernels::": "matmul", "aten::_scaled_dot_product": "attention",
    "aten::_flash_attention": "attention", "aten::_efficient_attention": "attention",
}  # fmt: skip


def scope(heading: str) -> record_function:
    """A context that puts what runs inside under a heading of the profile; costs next to nothing without one."""
    return record_function(_MARK + heading)


def step_table(events: Iterable[FunctionEvent]) -> dict[str, float]:
    """Seconds under each of `HEADINGS`: operators' own time on the CUDA device if it was used, else on the CPU.

    masks: drawing, expanding and applying them, and the rest of our linear that is no matrix product.
    """
    # Kernels on the device are listed too, but their time is also that of the operators which launched them.
    events = sorted((e for e in events if e.device_type == DeviceType.CPU), key=lambda e: e.time_range.start)
    on_device = any(event.self_device_time_total for event in events)
    # A backward node bears the number of its forward operator: the last one to start with it, as others only peek.
    forward: dict[int, str] = {}
    for event in events:
        if event.sequence_nr >= 0 and not any(e.name.startswith(_BACKWARD) for e in (event, event.cpu_parent) if e):
            forward[event.sequence_nr] = _heading(event, {})
    table = dict.fromkeys(HEADINGS, 0.0)
    for event in events:
        own = event.self_device_time_total if on_device else event.self_cpu_time_total
        table[_heading(event, forward)] += own / 1e6
    return table


def _heading(event: FunctionEvent, forward: dict[int, str]) -> str:
    nearest = ""
    at: FunctionEvent | None = event
    while at is not None:
        if at.name.startswith(_MARK):
            found = at.name.removeprefix(_MARK)
        elif at.name.startswith(_BACKWARD):
            found = forward.get(at.sequence_nr, "")
        else:
            found = next((heading for start, heading in _SCOPES.items() if at.name.startswith(start)), "")
        if found in _WHOLE:
            return found
        nearest = nearest or found
        at = at.cpu_parent
    by_name = (heading for start, heading in _OPERATORS.items() if event.name.startswith(start))
    return next(by_name, nearest or "other")


class Profiler(Callback):
    """Profiles `steps` steps of each phase, after its first, and writes a trace and a row of the table for each.

    Files under `folder`: <phase>.json.gz (open it in chrome://tracing or Perfetto), table.json and table.txt.
    """

    def __init__(self, folder: Path, phase_of: Callable[[int], str], total: int, steps: int = 3) -> None:
        """phase_of names the phase of a LoRA step counted from 0; total is the number of LoRA steps."""
        self.folder = folder
        phases = [phase_of(step) for step in range(total)]
        self.spans: dict[str, range] = {}
        for phase in dict.fromkeys(phases):
            start, count = phases.index(phase), phases.count(phase)
            self.spans[phase] = range(start + min(1, count - 1), start + min(1 + steps, count))
        self.rows: dict[str, dict[str, float]] = {}
        self._profile: profile | None = None
        self._hooks: list[Any] = []
        self._since = 0.0

    def on_phase(self, loop: Loop) -> None:
        span = self.spans.get(loop.phase)  # the freeze opens "settle", which may have no step
        if span is not None and loop.step == span.start:
            self._start(loop.model)

    def on_step(self, loop: Loop, record: Record | None) -> None:
        span = self.spans[loop.phase]
        if self._profile is not None and loop.step == span.stop:
            self._write(loop.phase, len(span), self._stop(self._profile))
        if loop.step == span.start:
            self._start(loop.model)

    def on_end(self, loop: Loop) -> None:
        if self._profile is not None:
            self._stop(self._profile)

    def _start(self, model: nn.Module) -> None:
        self._hooks = list(_mark_modules(model))
        self._profile = profile(activities=[ProfilerActivity.CPU, *[ProfilerActivity.CUDA] * torch.cuda.is_available()])
        self._profile.start()
        self._since = time.perf_counter()

    def _stop(self, running: profile) -> profile:
        self._profile = None
        running.stop()
        for hook in self._hooks:
            hook.remove()
        return running

    def _write(self, phase: str, steps: int, finished: profile) -> None:
        wall = (time.perf_counter() - self._since) / steps
        self.folder.mkdir(parents=True, exist_ok=True)
        with whole_file(self.folder / f"{phase}.json.gz") as trace:
            finished.export_chrome_trace(str(trace))
        self.rows[phase] = {name: seconds / steps for name, seconds in step_table(finished.events()).items()}
        self.rows[phase]["wall"] = wall
        write_json(self.folder / "table.json", self.rows)
        write_text(self.folder / "table.txt", format_table(self.rows))


def format_table(rows: dict[str, dict[str, float]]) -> str:
    """Milliseconds per step and their share, one line per heading, one column per phase; wall is the clock's time."""
    lines = [f"{'ms per step':<12}" + "".join(f"{phase:>18}" for phase in rows)]
    totals = {phase: sum(row[heading] for heading in HEADINGS) for phase, row in rows.items()}
    for heading in HEADINGS:
        cells = (f"{1e3 * row[heading]:.1f} ({row[heading] / totals[phase]:4.0%})" for phase, row in rows.items())
        lines.append(f"{heading:<12}" + "".join(f"{cell:>18}" for cell in cells))
    for name, values in (("operators", totals.values()), ("wall", (row["wall"] for row in rows.values()))):
        lines.append(f"{name:<12}" + "".join(f"{1e3 * value:11.1f}{'':7}" for value in values))
    return "\n".join(line.rstrip() for line in lines) + "\n"


def _mark_modules(model: nn.Module) -> Iterator[Any]:
    """Hooks that open a scope around norms and attention blocks."""
    for name, module in model.named_modules():
        norm, attention = type(module).__name__.endswith("RMSNorm"), name.endswith(".self_attn")
        if norm or attention:
            heading = "norm" if norm else "attention"
            marks: list[record_function] = []
            yield module.register_forward_pre_hook(lambda *_, h=heading, m=marks: m.append(_opened(h)))
            # Also after an exception, by which checkpointing ends what it computes anew.
            yield module.register_forward_hook(lambda *_, m=marks: m.pop().__exit__(None, None, None), always_call=True)


def _opened(heading: str) -> record_function:
    mark = scope(heading)
    mark.__enter__()
    return mark
