"""The decision step: one update of the generator, and the mask that the LoRA step then sees."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from atp import processes
from atp.config import DecisionsConfig
from atp.decide.budget import Budget
from atp.decide.fit import exact_mask, exact_offset, fit_mask
from atp.decide.generator import DecisionGenerator
from atp.decide.sampling import gumbel_noise, hard_mask, logistic_noise, soft_mask, straight_through
from atp.finite import FiniteGuard
from atp.spaces.space import MaskSpace

_LATE_SEARCH = 0.8  # after this share of the search the generator's learning rate falls ...
_LATE_FACTOR = 0.2  # ... to this factor of itself (docs/method.md section 5)


@dataclass(frozen=True)
class DecisionOutcome:
    """What one decision step did: its losses, and whether it was applied. Scalar tensors; reading one may sync."""

    loss: Tensor
    budget_loss: Tensor
    applied: Tensor


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """Takes a model's trained parameters out of autograd inside a with block, where only masks need gradients."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in trained:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)


class DecisionMaker:
    """Owns the generator, its optimizer, its noise and the current hard mask bool [space.size].

    Budget `penalty` is the paper's: Gumbel-sigmoid samples with a fixed offset, alpha * |log(p / p*)| in the loss, and
    a freshly sampled hard mask for every LoRA step. Budget `exact` solves for the offset that keeps exactly p_t of the
    parameters, with p_t on a cubic schedule; only the decision step draws noise, and the LoRA step sees the noise-free
    mask, because LoRA does not converge while its masks flip (docs/method.md sections 2 and 5).
    """

    def __init__(
        self,
        space: MaskSpace,
        config: DecisionsConfig,
        *,
        search_steps: int,
        prior: Tensor | None,
        seed: int,
        max_bad_steps: int = 5,
    ) -> None:
        self.space, self.config, self.search_steps = space, config, search_steps
        self.budget = Budget(space)
        self.generator = DecisionGenerator(space, kind=config.generator, prior=prior, seed=seed)
        self.optimizer = torch.optim.AdamW(self.generator.parameters(), lr=config.lr, fused=True)
        self.noise = torch.Generator().manual_seed(seed)
        self.mask = torch.ones(space.size, dtype=torch.bool)
        self.frozen = False
        self.changed = torch.zeros(())
        self.finite = FiniteGuard(max_bad_steps, "decision steps")

    def target_at(self, step: int) -> float:
        """Share of parameters to keep after `step` search steps: a cubic fall (`exact`) or the target at once."""
        target = self.config.target_keep
        if self.config.budget == "penalty":
            return target
        done = min(step / max(self.config.reach * self.search_steps, 1), 1.0)
        return target + (1 - target) * (1 - done) ** 3

    def update(self, step: int, loss_of: Callable[[Tensor], Tensor]) -> DecisionOutcome:
        """One optimizer step of the generator. loss_of maps a soft mask [space.size] to the calibration loss.

        A non-finite gradient changes nothing; `finite` counts it and ends the run after too many, as for LoRA steps.
        """
        self.generator.train()
        for group in self.optimizer.param_groups:
            group["lr"] = self.config.lr * (_LATE_FACTOR if step >= _LATE_SEARCH * self.search_steps else 1.0)
        logits = self.generator()
        soft = self._soft(logits, step, noise=True)
        loss = loss_of(soft)
        budget_loss = torch.zeros(())
        if self.config.budget == "penalty":
            hard = hard_mask(logits, soft, self.space)
            budget_loss = self.config.alpha * self.budget.loss(straight_through(soft, hard), self.config.target_keep)
        (loss + budget_loss).backward()
        torch.nn.utils.clip_grad_norm_(self.generator.parameters(), self.config.clip)
        bad = self.finite.check(self.optimizer, step + 1)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return DecisionOutcome(loss.detach(), budget_loss.detach(), ~bad)

    @torch.no_grad()
    def refresh(self, step: int) -> Tensor:
        """Draws the hard mask for the LoRA step with this number, bool [space.size]."""
        exact = self.config.budget == "exact"
        self.generator.train(not exact)
        logits = self.generator()
        if exact:
            mask = exact_mask(logits, self.target_at(step + 1), self.budget)
        else:
            mask = hard_mask(logits, self._soft(logits, step, noise=True), self.space)
        self._replace(mask)
        return mask

    @torch.no_grad()
    def freeze(self) -> Tensor:
        """Takes the noise-free decision and fits it to budget and width rules; the mask does not change afterwards.

        Raises `NotReached` when too many decision steps were not finite, or the logits are not.
        """
        self.finite.finish(-(-self.search_steps // self.config.every))
        self.generator.eval()
        target = self.config.target_keep
        self._replace(fit_mask(self.generator(), target, self.budget, self.config.multiples))
        self.frozen = True
        return self.mask

    def record(self, step: int) -> dict[str, float]:
        """What is logged after `step` search steps: share kept, target share, share of decisions that changed."""
        return {
            "keep": self.budget.share(self.mask),
            "target_keep": self.target_at(step),
            "changed": float(self.changed),
        }

    def _replace(self, mask: Tensor) -> None:
        """Takes the main process's mask: rounding differences between devices must not lead to different cuts."""
        mask = processes.from_main(mask, "decisions")
        self.changed = (mask != self.mask).float().mean()
        self.mask = mask

    def _soft(self, logits: Tensor, step: int, *, noise: bool) -> Tensor:
        size = self.space.size
        if self.config.budget == "penalty":
            drawn = gumbel_noise(size, self.noise) if noise else None
            return soft_mask(logits, self.config.offset, self.config.temperature, drawn)
        drawn = self.config.noise * logistic_noise(size, self.noise) if noise else None
        offset = exact_offset(logits, self.target_at(step + 1), self.budget)
        return soft_mask(logits, offset, self.config.temperature, drawn)
