"""The decision step: one update of the generator, and the mask that the LoRA step then sees."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from atp.config import DecisionsConfig
from atp.decide.decisions import Decisions
from atp.decide.fit import exact_offset
from atp.decide.generator import DecisionGenerator
from atp.decide.sampling import gumbel_noise, hard_mask, logistic_noise, soft_mask, straight_through
from atp.ground.devices import upload
from atp.processes import processes
from atp.processes.finite import FiniteGuard
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


class DecisionMaker(Decisions):
    """Learned decisions: owns the generator, its optimizer and its noise.

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
        device: torch.device | str = "cpu",
    ) -> None:
        super().__init__(space, config, search_steps=search_steps, device=device)
        self.generator = DecisionGenerator(space, kind=config.generator, prior=prior, seed=seed).to(self.device)
        self.optimizer = torch.optim.AdamW(self.generator.parameters(), lr=config.lr, fused=True)
        self.noise = torch.Generator().manual_seed(seed)  # on the host: the same draws whatever the device
        self.finite = FiniteGuard(max_bad_steps, "decision steps")

    def target_at(self, step: int) -> float:
        return self.config.target_keep if self.config.budget == "penalty" else super().target_at(step)

    def logits(self) -> Tensor:
        """The generator's output without noise or dropout."""
        self.generator.eval()
        return self.generator()

    def update(self, step: int, loss_of: Callable[[Tensor], Tensor]) -> DecisionOutcome:
        """One optimizer step of the generator. loss_of maps a soft mask [space.size] on the device to the loss.

        Each process has its own loss; the gradient with respect to the mask, and so the step, is the mean over all.
        A non-finite gradient changes nothing; `finite` counts it and ends the run after too many, as for LoRA steps.
        """
        self.generator.train()
        for group in self.optimizer.param_groups:
            group["lr"] = self.config.lr * (_LATE_FACTOR if step >= _LATE_SEARCH * self.search_steps else 1.0)
        logits = self.ranked(self.generator())
        soft = self._soft(logits, step)
        soft.register_hook(_mean_over_processes)
        loss = loss_of(soft)
        budget_loss = torch.zeros((), device=self.device)
        if self.config.budget == "penalty":
            hard = hard_mask(logits, soft, self.solver.space)
            budget_loss = self.config.alpha * self.solver.loss(straight_through(soft, hard), self.config.target_keep)
        (loss + budget_loss).backward()
        torch.nn.utils.clip_grad_norm_(self.generator.parameters(), self.config.clip)
        bad = self.finite.check(self.optimizer, step + 1)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return DecisionOutcome(loss.detach(), budget_loss.detach(), ~bad)

    def learn(self, step: int, judged: AbstractContextManager[Callable[[Tensor], Tensor]]) -> dict[str, Tensor]:
        with judged as loss_of:
            outcome = self.update(step, loss_of)
        loss = outcome.loss.clone()
        processes.average_(loss)
        return {"decision_loss": loss, "budget_loss": outcome.budget_loss}

    def state(self) -> dict[str, Tensor]:
        generator = {f"generator.{name}": tensor for name, tensor in self.generator.state_dict().items()}
        return generator | {"rng.decision": self.noise.get_state()}

    def load_state(self, tensors: dict[str, Tensor]) -> None:
        self.generator.load_state_dict({name: tensors[f"generator.{name}"] for name in self.generator.state_dict()})
        self.noise.set_state(tensors["rng.decision"])

    def optimizers(self) -> list[tuple[torch.optim.Optimizer, list[str]]]:
        return [(self.optimizer, [name for name, _ in self.generator.named_parameters()])]

    @torch.no_grad()
    def refresh(self, step: int) -> Tensor:
        if self.config.budget == "exact":
            return super().refresh(step)
        self.generator.train()
        logits = self.ranked(self.generator())
        return self.replace(hard_mask(logits, self._soft(logits, step), self.solver.space))

    def freeze(self) -> Tensor:
        """As for all decisions. Raises `NotReached` also when too many decision steps were not finite."""
        self.finite.finish(-(-self.search_steps // self.config.every))
        return super().freeze()

    def _soft(self, logits: Tensor, step: int) -> Tensor:
        size = self.space.size
        if self.config.budget == "penalty":
            drawn = upload(gumbel_noise(size, self.noise), self.device)
            return soft_mask(logits, self.config.offset, self.config.temperature, drawn)
        drawn = upload(self.config.noise * logistic_noise(size, self.noise), self.device)
        offset = exact_offset(logits, self.target_at(step + 1), self.solver)
        return soft_mask(logits, offset, self.config.temperature, drawn)


def _mean_over_processes(gradient: Tensor) -> Tensor:
    gradient = gradient.clone(memory_format=torch.contiguous_format)
    processes.average_(gradient)
    return gradient
