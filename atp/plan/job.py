"""What a plan is made from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from atp.config import ResolvedConfig
from atp.inputs.loading import weights_dtype
from atp.plan.parameters import parameters_of
from atp.plan.shapes import ModelShapes
from atp.processes import processes
from atp.training.schedule import Phases


@dataclass(frozen=True)
class Questions:
    """Sequences that a run scores for its questions with labels; tokens of the longest, and of all."""

    sequences: int = 0
    longest: int = 0
    tokens: int = 0

    @classmethod
    def of(cls, lengths: Sequence[int]) -> Questions:
        """lengths: tokens of each sequence, as `check_tasks` returns them."""
        return cls(len(lengths), max(lengths, default=0), sum(lengths))


@dataclass(frozen=True)
class Workload:
    """A run that is asked for, with what is known of its model, its device and its data.

    before, after: parameters by part and their `total`, of the whole model and of the one that equal widths leave.
    autocast: dtype of the products, None for that of the weights. device: cpu or cuda. sample, calibrated: tokens of an
    average sample of the training and of the calibration data. scored: share of the tokens that have a loss. count: of
    processes, each on a device of its own. shared: whether they share the frozen weights. questions: those that are
    scored, before the training and after it.
    """

    config: ResolvedConfig
    shapes: ModelShapes
    before: dict[str, int]
    after: dict[str, int]
    autocast: torch.dtype | None
    device: str
    sample: float
    calibrated: float
    scored: float
    count: int
    shared: bool
    questions: Questions

    @classmethod
    def of(
        cls,
        config: ResolvedConfig,
        shapes: ModelShapes,
        *,
        autocast: torch.dtype | None,
        device: str,
        sample: float | None = None,
        calibrated: float | None = None,
        scored: float = 1.0,
        count: int | None = None,
        questions: Questions | None = None,
    ) -> Workload:
        """Counts the parameters.

        sample, calibrated: default data.length, which no sample exceeds. count: default that of now. questions: default
        none.
        """
        before, after = parameters_of(shapes.config), parameters_of(shapes.cut_config)
        count = count or processes.count()
        shared = count > 1 and (config.training.sharding is not None or processes.sharded())
        return cls(
            config, shapes, before, after, autocast, device, sample or config.data.length,
            calibrated or config.data.length, scored, count, shared, questions or Questions(),
        )  # fmt: skip

    def share_of(self, windows: int) -> int:
        """The calibration windows of so many that one process takes."""
        return -(-windows // self.count)

    @property
    def phases(self) -> Phases:
        """The LoRA steps of each phase."""
        return Phases.from_config(self.config.training)

    @property
    def refits(self) -> bool:
        """Whether linears are fitted before the cut: experts have none that could make up for them."""
        readers = any(structure.reader for structure in self.shapes.space.structures)
        return readers and self.config.decisions.refit_windows > 0

    @property
    def keeps_apart(self) -> bool:
        """Whether rows hold several samples that do not see each other."""
        return self.config.data.packing in ("separate", "fitted")

    @property
    def measures_saliency(self) -> bool:
        """Whether saliency is measured on calibration data between two phases."""
        decisions = self.config.decisions
        return decisions.path is None and (
            decisions.source in ("static", "tuned") or (decisions.source == "learned" and decisions.init == "saliency")
        )

    @property
    def dtype(self) -> torch.dtype:
        """That of the weights, in training and in the exported model."""
        return weights_dtype(self.config.model, self.shapes.config)
