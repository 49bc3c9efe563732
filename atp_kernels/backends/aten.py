"""The `reference` backend of operations without a room: composed ATen calls, on any device and dtype."""

from collections.abc import Sequence

import torch
from torch import Tensor

from atp_kernels import reference
from atp_kernels.call import CACHED_ELEMENTS, Call
from atp_kernels.checks import check_written
from atp_kernels.plan import GroupPlan
from atp_kernels.reference import compact

__all__ = [
    "compact",
    "cross_entropy_",
    "group_lasso_backward",
    "group_lasso_forward",
    "group_lasso_grad_",
    "group_prox_",
    "supports",
]


def supports(call: Call) -> str | None:
    """Every call."""
    return None


def group_lasso_forward(
    factors: Sequence[Tensor], plan: GroupPlan, removed: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """Return (value, norms [n_groups]) with norms = sqrt(sum of squares + eps)."""
    norms = reference.group_squares(factors, plan._groups, plan.n_groups).add_(eps).sqrt_()
    # A product with zero would not silence a kept group that holds NaN.
    return torch.where(removed & plan.owned, norms, 0).sum(), norms


def group_lasso_backward(
    factors: Sequence[Tensor], plan: GroupPlan, removed: Tensor, norms: Tensor, grad_out: Tensor
) -> list[Tensor]:
    """d value / d factor = factor / norm of its group, for removed groups; zero elsewhere, whatever is there."""
    slope = torch.where(removed & (norms != 0), grad_out / norms, 0)
    slopes = [slope[index].unsqueeze(1 - axis) for axis, index in plan._groups]
    return [torch.where(by == 0, 0, factor * by).to(factor.dtype) for factor, by in zip(factors, slopes, strict=True)]


def group_lasso_grad_(
    factors: Sequence[Tensor], grads: Sequence[Tensor], plan: GroupPlan, removed: Tensor, weight: Tensor, eps: float
) -> Tensor:
    """Return the value; grads += weight * d value / d factor, one of the shape and dtype of every factor."""
    plan.check(factors)
    check_written(grads, "gradients")
    value, norms = group_lasso_forward(factors, plan, removed, eps)
    for grad, part in zip(grads, group_lasso_backward(factors, plan, removed, norms, weight), strict=True):
        grad += part
    return value


def group_prox_(factors: Sequence[Tensor], plan: GroupPlan, removed: Tensor, threshold: Tensor) -> None:
    """The definition itself: see `reference.group_prox_`."""
    reference.group_prox_(factors, plan._groups, removed, threshold)


def cross_entropy_(logits: Tensor, targets: Tensor) -> Tensor:
    """The definition, on a CPU in blocks of rows: fresh memory for all of them costs more than the softmax does."""
    rows, vocab = logits.shape
    step = max(1, CACHED_ELEMENTS // vocab) if logits.device.type == "cpu" else max(1, rows)
    blocks = zip(logits.split(step), targets.split(step), strict=True)
    return torch.cat([reference.cross_entropy_(some, indices) for some, indices in blocks])
