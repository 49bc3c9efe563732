"""When a run does what, in LoRA steps: its phases and its learning rate (docs/method.md section 5)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from atp.config import TrainingConfig
from atp.config.resolved import ResolvedTraining
from atp.config.training import FULL_LR

Phase = Literal["open", "search", "settle", "tune"]


@dataclass(frozen=True)
class Phases:
    """Open -> search -> settle -> cut -> tune. The cut happens between the last settle step and the first tune step."""

    search: int
    settle: int
    tune: int
    open: int = 0

    @classmethod
    def from_config(cls, config: TrainingConfig) -> Phases:
        """The phases a training config asks for. Raises `InputError` for minutes or tokens, which are no steps yet."""
        config.require_steps()
        before = config.opened + config.search + config.settle
        return cls(config.search, config.settle, config.total - before, config.opened)

    @property
    def freeze_step(self) -> int:
        """Number of LoRA steps done when the decisions are frozen."""
        return self.open + self.search

    @property
    def cut_step(self) -> int:
        """Number of LoRA steps done when the model is cut."""
        return self.freeze_step + self.settle

    @property
    def total(self) -> int:
        """LoRA steps of the run."""
        return self.cut_step + self.tune

    def of(self, step: int) -> Phase:
        """The phase of the LoRA step with this number, counted from 0."""
        if step < self.open:
            return "open"
        if step < self.freeze_step:
            return "search"
        return "settle" if step < self.cut_step else "tune"


def learning_rate(config: ResolvedTraining, step: int) -> float:
    """The learning rate of the LoRA step with this number, counted from 0, in a run of `config.total` steps.

    It rises from 0 to `lr` linearly over `warmup` steps, then stays, or falls to 0 linearly or by half a cosine.
    """
    # null only where no data are known, and there is no step then
    return _scheduled(config, config.lr or 0.0, step, config.total)


def full_rate(config: ResolvedTraining, step: int) -> float:
    """The same where all weights are tuned after the cut: from 0 at the cut to `full_lr`, and to the end of the run."""
    cut = Phases.from_config(config).cut_step
    return _scheduled(config, config.full_lr or FULL_LR, step - cut, config.total - cut)


def _scheduled(config: ResolvedTraining, highest: float, step: int, total: int) -> float:
    if step < config.warmup:
        return highest * (step / config.warmup)
    if config.schedule == "constant":
        return highest
    falling = max(1, total - config.warmup)
    if config.schedule == "linear":
        return highest * max(0.0, (total - step) / falling)
    return highest * max(0.0, 0.5 * (1.0 + math.cos(math.pi * ((step - config.warmup) / falling))))
