"""The four phases of a run: search -> settle -> cut -> tune, counted in LoRA steps (1-method.md section 5)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from atp.config import TrainingConfig

Phase = Literal["search", "settle", "tune"]


@dataclass(frozen=True)
class Phases:
    """Which phase a LoRA step belongs to. The cut happens between the last settle step and the first tune step."""

    search: int
    settle: int
    tune: int

    @classmethod
    def from_config(cls, config: TrainingConfig) -> Phases:
        """The phases a training config asks for."""
        return cls(config.search, config.settle, config.tune)

    @property
    def cut_step(self) -> int:
        """Number of LoRA steps done when the model is cut."""
        return self.search + self.settle

    @property
    def total(self) -> int:
        """LoRA steps of the run."""
        return self.cut_step + self.tune

    def of(self, step: int) -> Phase:
        """The phase of the LoRA step with this number, counted from 0."""
        if step < self.search:
            return "search"
        return "settle" if step < self.cut_step else "tune"
