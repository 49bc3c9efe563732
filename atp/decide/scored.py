"""Decisions by saliency alone: measured once, or a running mean over the gradients of LoRA steps."""

from __future__ import annotations

import torch
from torch import Tensor

from atp.config import DecisionsConfig
from atp.decide.decisions import Decisions, fit_decisions
from atp.decide.saliency import saliency_logits
from atp.processes import processes
from atp.spaces.space import MaskSpace


class ScoredDecisions(Decisions):
    """Keeps the decisions with the largest saliency per cost (docs/method.md section 9).

    saliency: float32 [space.size]; zero until it is measured. A running one follows the squared mask
    gradients of LoRA steps, S <- decay * S + (1 - decay) * g^2. A removed decision keeps the score it had: where it
    is masked, its gradient says nothing about it. Decisions that are kept lead by `decisions.margin` standard
    deviations of the logits, so that few flip.
    """

    def __init__(
        self, space: MaskSpace, config: DecisionsConfig, *, search_steps: int, device: torch.device | str = "cpu"
    ) -> None:
        super().__init__(space, config, search_steps=search_steps, device=device)
        self.saliency = torch.zeros(space.size, device=device)

    def observe(self, square: Tensor) -> None:
        """Takes (dL/ds)^2 of one batch, the mean over its samples, float32 [space.size]; where one value is not finite
        it changes nothing."""
        square = square.to(self.device)
        seen = self.placed & square.isfinite().all()
        self.saliency = torch.where(seen, torch.lerp(square, self.saliency, self.config.decay), self.saliency)

    @torch.no_grad()
    def at(self, share: float) -> Tensor:
        """The mask that the saliency of now gives with another share to keep, bool [space.size], on the host."""
        config = self.config.model_copy(update={"target_keep": share})
        return processes.from_main(fit_decisions(self.logits(), config, self.budget).cpu(), "decisions")

    def logits(self) -> Tensor:
        logits = saliency_logits(self.saliency, self.solver, self.config)
        margin = self.config.margin * self.config.saliency_scale if self.config.source == "running" else 0.0
        return logits + margin * self.placed
