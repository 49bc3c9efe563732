"""Warm start of the generator's logits: how much the loss depends on each decision (docs/method.md section 9).

The gradient of the loss with respect to a mask value at 1 is the first-order Taylor effect of removing that decision;
its mean square over samples is the diagonal Fisher information of the mask.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from atp.config import DecisionsConfig
from atp.decide.budget import Budget
from atp.ground.errors import NotReached
from atp.processes import processes
from atp.processes.finite import is_finite
from atp.spaces.space import MaskSpace


def fisher_saliency(
    space: MaskSpace,
    batches: Iterable[dict[str, Tensor]],
    loss_of: Callable,
    *,
    at: Tensor | None = None,
    among: int | None = None,
    blocks: bool = False,
) -> Tensor:
    """Mean over batches of (dL/ds)^2 at s = 1, float32 [space.size]; with blocks of all `squares`.

    at: a hard mask, bool [space.size], at whose values of s the gradient is taken in place of 1; what it removes has 0.
    among: all processes call this, and `batches` are those of this one's `processes.shares` of so many. Default: they
    are all there are.
    loss_of(batch, mask) is the calibration loss under a soft mask; batches of one sample give the Fisher information
    of samples, larger ones that of batch means. Raises `NotReached` for a batch with a non-finite gradient, because one
    such batch would make every score NaN.
    """
    total, count = torch.zeros(space.size + blocks * len(space.structures)), 0
    counted = None if among is None else len(range(processes.rank(), among, processes.count()))
    for batch in batches:
        mask = (torch.ones(space.size) if at is None else at.float()).requires_grad_()
        (gradient,) = torch.autograd.grad(loss_of(batch, mask), mask)
        square = squares(gradient if at is None else gradient * at, space, blocks=blocks)
        count += 1
        if not is_finite(square):
            raise NotReached(
                f"calibration window {count} has a non-finite gradient, which no decision can start from: use "
                "model.dtype=float32 and training.precision=float32, or leave that text out"
            )
        if counted is None or count <= counted:
            total += square
    if among is None:
        return total / max(count, 1)
    return processes.sum_(total) / among


def squares(gradients: Tensor, space: MaskSpace, *, blocks: bool) -> Tensor:
    """Squared mask gradients [..., size of the space]; with blocks [..., size + structures].

    What is added for a structure is the square of the sum of its gradients, which is that of one mask value on all of
    its decisions: removing them together costs other than the sum of what each costs alone.
    """
    if not blocks:
        return gradients.square()
    parts = gradients.split([structure.size for structure in space.structures], -1)
    return torch.cat([gradients, torch.stack([part.sum(-1) for part in parts], -1)], -1).square()


def saliency_logits(saliency: Tensor, budget: Budget, config: DecisionsConfig) -> Tensor:
    """Logits ordered by saliency per cost: standardised log scores times `saliency_scale`, [size] like saliency.

    Decisions of all structures and layers compete for the same parameters, so the saliency is divided by a power,
    `cost_exponent`, of the number of parameters that a decision saves (dev/LOG.md has what powers are worth).
    """
    scores = (saliency / budget.cost() ** config.cost_exponent).clamp_min(torch.finfo(torch.float32).tiny).log()
    return config.saliency_scale * (scores - scores.mean()) / scores.std().clamp_min(1e-6)
