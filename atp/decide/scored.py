"""Decisions by saliency alone: measured once, or a running mean over the gradients of LoRA steps."""

from __future__ import annotations

import torch
from torch import Tensor

from atp.config import DecisionsConfig
from atp.decide.blocks import fit_with_blocks
from atp.decide.decisions import Decisions
from atp.decide.saliency import saliency_logits
from atp.spaces.space import MaskSpace


class ScoredDecisions(Decisions):
    """Keeps the decisions with the largest saliency per cost (docs/method.md section 9).

    saliency: float32 [space.size], or what `squares` makes of it with `decisions.blocks`; zero until it is measured. A
    running one follows the squared mask gradients of LoRA steps, S <- decay * S + (1 - decay) * g^2. A removed decision
    keeps the score it had: where it is masked, its gradient says nothing about it, nor about its block. Decisions that
    are kept lead by `decisions.margin` standard deviations of the logits, so that few flip.
    """

    def __init__(
        self, space: MaskSpace, config: DecisionsConfig, *, search_steps: int, device: torch.device | str = "cpu"
    ) -> None:
        super().__init__(space, config, search_steps=search_steps, device=device)
        self.saliency = torch.zeros(space.size + config.blocks * len(space.structures), device=device)

    def observe(self, square: Tensor) -> None:
        """As for all decisions; where one value is not finite it changes nothing."""
        square = square.to(self.device)
        placed = self.placed
        if self.config.blocks:
            whole = [part.all() for part in placed.split([structure.size for structure in self.space.structures])]
            placed = torch.cat([placed, torch.stack(whole)])
        seen = placed & square.isfinite().all()
        self.saliency = torch.where(seen, torch.lerp(square, self.saliency, self.config.decay), self.saliency)

    def rescore(self, saliency: Tensor) -> None:
        self.saliency = saliency.to(self.device)

    def state(self) -> dict[str, Tensor]:
        return {"saliency": self.saliency}

    def load_state(self, tensors: dict[str, Tensor]) -> None:
        self.rescore(tensors["saliency"])

    def logits(self) -> Tensor:
        logits = saliency_logits(self.saliency[: self.space.size], self.solver, self.config)
        margin = self.config.margin * self.config.saliency_scale if self.config.source == "running" else 0.0
        return logits + margin * self.placed

    def fitted(self, share: float) -> Tensor:
        if not self.config.blocks:
            return super().fitted(share)
        config = self.config.model_copy(update={"target_keep": share})
        return fit_with_blocks(self.logits(), self.saliency, self.budget, config)
