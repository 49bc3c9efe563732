"""Group lasso, its gradient and its proximal step in ATen calls, with the gradient derived by hand."""

from collections.abc import Sequence

import torch
from torch import Tensor

from atp_kernels.call import Call
from atp_kernels.checks import check_written
from atp_kernels.groups import definition
from atp_kernels.groups.plan import GroupPlan


def supports(call: Call) -> str | None:
    """Every call."""
    return None


def group_lasso_forward(
    factors: Sequence[Tensor], plan: GroupPlan, removed: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """Return (value [], norms [n_groups]) with norms = sqrt(sum of squares + eps), in float32 or better."""
    norms = definition.group_squares(factors, plan._groups, plan.n_groups).add_(eps).sqrt_()
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
    """Return the value; grads += weight * d value / d factor, each of the shape and dtype of its factor.

    Raises ValueError for factors that do not fit the plan, and as `check_written` does for grads.
    """
    plan.check(factors)
    check_written(grads, "gradients")
    value, norms = group_lasso_forward(factors, plan, removed, eps)
    for grad, part in zip(grads, group_lasso_backward(factors, plan, removed, norms, weight), strict=True):
        grad += part
    return value


def group_prox_(factors: Sequence[Tensor], plan: GroupPlan, removed: Tensor, threshold: Tensor) -> None:
    """In place: each removed group <- group * max(0, 1 - threshold / ||group||), with a threshold [n_groups]."""
    definition.group_prox_(factors, plan._groups, removed, threshold)
