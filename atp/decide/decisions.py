"""What all decisions share: the hard mask, the share it keeps at each step of the search, and the freeze."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import AbstractContextManager

import torch
from torch import Tensor

from atp.config import DecisionsConfig
from atp.decide.budget import Budget
from atp.decide.fit import exact_mask, fit_mask
from atp.decide.rules import width_rules
from atp.decide.uniform import equal_ranks, fit_equal, require_equal_layers
from atp.ground.devices import upload
from atp.processes import processes
from atp.processes.finite import FiniteGuard
from atp.spaces.space import MaskSpace


class Decisions(ABC):
    """The current hard mask, bool [space.size]. Subclasses say which logits it follows.

    What only some decisions do (learn, observe, rescore) does nothing here, so that nobody asks which ones they are.

    search_steps: length of the search, over whose first part the share kept falls to the target. device: where logits
    and the thresholds that meet the budget are computed; it must have float64. `mask` lies on the host, because widths
    follow from it, and `placed` is its copy on the device. A new decision costs the host one read, that of its mask.
    """

    def __init__(
        self, space: MaskSpace, config: DecisionsConfig, *, search_steps: int, device: torch.device | str = "cpu"
    ) -> None:
        if config.uniform:
            require_equal_layers(space)
        self.space, self.config, self.search_steps = space, config, search_steps
        self.device = torch.device(device)
        placed = space.to(self.device)
        self.budget = Budget(space)  # of masks on the host ...
        self.solver = self.budget if placed is space else Budget(placed)  # ... and of those on the device
        self.mask = torch.ones(space.size, dtype=torch.bool)
        self.frozen = False
        self.changed = torch.zeros(())
        self.finite = FiniteGuard(1, "decision steps")  # for those that have steps

    @property
    def mask(self) -> Tensor:
        """The current hard mask, on the host. Whoever sets it uploads it."""
        return self._mask

    @mask.setter
    def mask(self, mask: Tensor) -> None:
        self._mask, self.placed = mask, upload(mask, self.device)

    @abstractmethod
    def logits(self) -> Tensor:
        """One logit per decision, float32 [space.size] on the device; larger keeps."""

    def learn(self, step: int, judged: AbstractContextManager[Callable[[Tensor], Tensor]]) -> dict[str, Tensor]:
        """Learns from one decision step and returns figures to log, scalars; nothing where nothing is learned.

        judged: entered for it, it gives a function from a soft mask [space.size] on the device to the loss.
        """
        return {}

    def observe(self, square: Tensor) -> None:  # noqa: B027
        """Takes (dL/ds)^2 of one batch, the mean over its samples, float32 [space.size], where saliency runs."""

    def rescore(self, saliency: Tensor) -> None:  # noqa: B027
        """Takes a new saliency, float32 [space.size], where decisions follow one."""

    def state(self) -> dict[str, Tensor]:
        """What a checkpoint holds of what the logits come from, without optimizers."""
        return {}

    def load_state(self, tensors: dict[str, Tensor]) -> None:  # noqa: B027
        """The inverse of `state`; other tensors of the checkpoint may be among them."""

    def optimizers(self) -> list[tuple[torch.optim.Optimizer, list[str]]]:
        """Optimizers whose state a checkpoint holds, each with the names of its parameters in order."""
        return []

    @torch.no_grad()
    def at(self, share: float) -> Tensor:
        """The mask that the logits of now give with another share to keep, bool [space.size], on the host."""
        return processes.from_main(self.fitted(share).cpu(), "decisions")

    def fitted(self, share: float) -> Tensor:
        """The mask that the logits give with a share to keep, under all rules, bool [space.size]."""
        return fit_decisions(self.logits(), self.config.model_copy(update={"target_keep": share}), self.budget)

    def target_at(self, step: int) -> float:
        """Share of parameters to keep after `step` search steps, on a cubic fall (docs/method.md section 5)."""
        target = self.config.target_keep
        done = min(step / max(self.config.reach * self.search_steps, 1), 1.0)
        return target + (1 - target) * (1 - done) ** 3

    @torch.no_grad()
    def refresh(self, step: int) -> Tensor:
        """Takes the hard mask for the LoRA step with this number of the search, bool [space.size]."""
        return self.replace(exact_mask(self.ranked(self.logits()), self.target_at(step + 1), self.solver))

    @torch.no_grad()
    def freeze(self) -> Tensor:
        """Fits the decisions to budget and width rules; the mask does not change afterwards.

        Raises `NotReached` for logits that are not finite.
        """
        mask = self.fitted(self.config.target_keep)
        self.frozen = True
        return self.replace(mask)

    def ranked(self, logits: Tensor) -> Tensor:
        """The logits that thresholds follow, float32 [space.size]: equal by rank where all layers must be equal."""
        return equal_ranks(logits, self.space) if self.config.uniform else logits

    def record(self, step: int) -> dict[str, float]:
        """What is logged after `step` search steps: share kept, target share, share of decisions that changed."""
        return {
            "keep": self.budget.share(self.mask),
            "target_keep": self.target_at(step),
            "changed": float(self.changed),
        }

    def replace(self, mask: Tensor) -> Tensor:
        """Takes the main process's mask: rounding differences between devices must not lead to different cuts."""
        mask = processes.from_main(mask.cpu(), "decisions")
        self.changed = (mask != self.mask).float().mean()
        self.mask = mask
        return mask


def fit_decisions(logits: Tensor, config: DecisionsConfig, budget: Budget) -> Tensor:
    """The mask that a config asks for, bool [size], from logits [size]. Raises `NotReached` if they are not finite."""
    if not config.uniform:
        return fit_mask(logits, config.target_keep, budget, config.multiples)
    return fit_equal(logits, config.target_keep, budget, width_rules(budget, config.target_keep, config.multiples))
