"""What a run tells of itself: the protocol of callbacks, the progress bar, and experiment trackers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers
from accelerate.utils import LoggerType
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from atp.ground import progress
from atp.ground.errors import InputError, shorten
from atp.processes import processes

if TYPE_CHECKING:
    from atp.training.loop import Loop

Record = dict[str, Any]
"""One line of metrics.jsonl."""


class Callback:
    """Override what you need. `loop.step` counts finished LoRA steps, `loop.phase` names the phase under way."""

    def on_phase(self, loop: Loop) -> None:
        """A phase begins, also the one that a resumed run continues; `loop.model` is ready."""

    def on_step(self, loop: Loop, record: Record | None) -> None:
        """A LoRA step ended. record: what was logged of it, None for a step that is not logged."""

    def on_checkpoint(self, loop: Loop, folder: Path) -> None:
        """A checkpoint was written to `folder`."""

    def on_end(self, loop: Loop) -> None:
        """Training ended, by an error too."""


class ProgressBar(Callback):
    """One bar for the whole run: phase, loss, share kept, tokens per second, time left. In a log: a line per record."""

    def __init__(self, display: Progress, total: int, title: str | None = None) -> None:
        """total: number of LoRA steps. title: shown in place of the phase."""
        self.progress, self.title, self.total = display, title, total
        self._task = display.add_task(title or "", total=total, note="")

    def on_phase(self, loop: Loop) -> None:
        self.progress.update(self._task, completed=loop.step, description=self.title or loop.phase)
        progress.begin(self.title or loop.phase)

    def on_step(self, loop: Loop, record: Record | None) -> None:
        if record is None:
            return
        note = progress.note(record)
        if loop.validation.last is not None:
            note += f"  validation {loop.validation.last:.3f}"
        self.progress.update(self._task, completed=loop.step, note=note)
        progress.step(self.title or loop.phase, record, self.total)


def make_progress() -> Progress:
    """The display that `ProgressBar` fills."""
    return progress.Bars(
        progress.PHASE, BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[note]}"),
        TextColumn("left"), TimeRemainingColumn(), disable=not processes.is_main(),
    )  # fmt: skip


class Trackers(Callback):
    """Sends records to the trackers of `training.report_to`, through accelerate."""

    def __init__(self) -> None:
        self._begun = False

    def on_phase(self, loop: Loop) -> None:
        if not self._begun:
            settings = {
                k: v if isinstance(v, int | float | str) else str(v) for k, v in _flat(loop.config.model_dump())
            }
            loop.accelerator.init_trackers("atp", config=settings)
            self._begun = True

    def on_step(self, loop: Loop, record: Record | None) -> None:
        if record is not None:
            numbers = {name: value for name, value in record.items() if isinstance(value, int | float)}
            loop.accelerator.log(numbers, step=loop.step)

    def on_end(self, loop: Loop) -> None:
        # Not accelerator.end_training(): it would end the process group, which the export still needs.
        for tracker in loop.accelerator.trackers:
            tracker.finish()


def check_trackers(names: Sequence[str]) -> None:
    """Refuses `training.report_to` where accelerate knows no tracker of a name, or its package is missing."""
    known = sorted(LOGGER_TYPE_TO_CLASS)  # also what the user registered with accelerate
    missing = set(LoggerType.list()) - {str(name) for name in get_available_trackers()}
    for name in names:
        if name in ("all", "none") and len(names) == 1:
            continue
        if name not in known:
            raise InputError(
                f"training.report_to: there is no tracker '{shorten(name)}': use some of {', '.join(known)}"
            )
        if name in missing:
            raise InputError(
                f"training.report_to: tracker '{name}' is not installed: install its package or leave it out"
            )


def _flat(values: dict[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    """(section.key, value) of nested settings."""
    nested = ((f"{prefix}{key}", value) for key, value in values.items())
    return [
        item
        for key, value in nested
        for item in (_flat(value, f"{key}.") if isinstance(value, dict) else [(key, value)])
    ]
