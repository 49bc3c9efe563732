"""Callbacks of the training loop: phases and guards, the clock, the progress bar."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from atp import processes
from atp.training.metrics import PhaseClock
from atp.training.profiling import scope

if TYPE_CHECKING:
    from atp.training.lora_trainer import LoraTrainer


class PhaseCallback(TrainerCallback):
    """Tells the trainer of optimizer steps, stops the loop at the cut and on signals, drops non-finite gradients."""

    def __init__(self, trainer: LoraTrainer) -> None:
        self.trainer = trainer

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.trainer.before_optimizer_step()
        trainer = self.trainer
        trainer.finite.check(trainer.adamw, state.global_step + 1, trainer.trained_beside())

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        with scope("optimizer"):
            self.trainer.after_optimizer_step(state.global_step)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        trainer = self.trainer
        # Processes must leave the loop after the same step, and a signal need not reach all of them in one.
        trainer.signals.received = processes.largest(trainer.signals.received or 0) or None
        if state.global_step == trainer.phases.cut_step:
            # The checkpoint of this step is written after the cut, by the trainer.
            control.should_training_stop, control.should_save = True, False
        elif trainer.signals.received is not None:
            control.should_save = control.should_training_stop = True


class ClockCallback(TrainerCallback):
    """Counts seconds and tokens of each step towards its phase: all that happens but logging and saving."""

    def __init__(self, clock: PhaseClock, phase_of: Callable[[int], str]) -> None:
        self.clock, self.phase_of = clock, phase_of
        self._since, self._tokens = 0.0, 0

    def count(self, tokens: int) -> None:
        """Adds the tokens of a batch to the step under way."""
        self._tokens += tokens

    @contextmanager
    def counted_as(self, phase: str) -> Iterator[None]:
        """Counts the seconds of a with block inside a step towards another phase than the step's."""
        started = time.perf_counter()
        yield
        seconds = time.perf_counter() - started
        self.clock.add(phase, seconds)
        self._since += seconds

    def _restart(self, *_: Any, **__: Any) -> None:
        self._since = time.perf_counter()

    on_train_begin = on_log = on_save = _restart

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.clock.add(self.phase_of(state.global_step - 1), time.perf_counter() - self._since, self._tokens)
        self._tokens = 0
        self._restart()


class ProgressCallback(TrainerCallback):
    """One bar for the whole run: phase, loss, share kept, tokens/s and time left."""

    def __init__(self, phase_of: Callable[[int], str], total: int, progress: Progress) -> None:
        """phase_of names the phase of a LoRA step counted from 0; total is the number of LoRA steps."""
        self.phase_of, self.progress = phase_of, progress
        self._task = progress.add_task(phase_of(0), total=total, note="")

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.progress.update(self._task, completed=state.global_step)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        if not logs or "loss" not in logs:
            return
        note = f"loss {logs['loss']:.3f}"
        if "keep" in logs:
            note += f"  kept {logs['keep']:.3f}"
        note += f"  {logs['tokens_per_second']:,.0f} tok/s"
        phase = self.phase_of(state.global_step - 1)
        self.progress.update(self._task, completed=state.global_step, description=phase, note=note)


def make_progress() -> Progress:
    """The bar that `ProgressCallback` fills."""
    return Progress(
        TextColumn("{task.description:>8}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[note]}"),
        TextColumn("left"), TimeRemainingColumn(), disable=not processes.is_main(),
    )  # fmt: skip
