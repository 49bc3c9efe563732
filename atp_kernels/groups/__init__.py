"""Operations on groups of rows and columns of many factors: group lasso, its gradient in place, its proximal step."""

from collections.abc import Sequence

import torch
from torch import Tensor

from atp_kernels.checks import check_eps, check_written
from atp_kernels.groups import op
from atp_kernels.groups.definition import Groups
from atp_kernels.groups.plan import GroupPlan
from atp_kernels.kinds import typed

__all__ = ["GroupPlan", "Groups", "group_lasso", "group_lasso_grad_", "group_prox_"]


@typed
def group_lasso(
    factors: Sequence[Tensor],
    groups: Groups | GroupPlan,
    removed: Tensor,
    *,
    eps: float = 1e-8,
    backend: str = "auto",
) -> Tensor:
    """Sum over removed groups of sqrt(sum of squares of the group + eps), for all factors in one call.

    factors: 2-D floating tensors. groups[i] = (axis, index): axis 0 groups the rows of factors[i], 1 its columns;
    index int64 [factors[i].shape[axis]] maps each to a group id in [0, n_groups). Equal ids in several factors form
    one joint group; a `GroupPlan` of them spares each call the checks and the sorting. removed: bool [n_groups]; a
    group that owns nothing adds nothing. Returns a float32 scalar (float64 if a factor is), differentiable once in
    the factors. Raises ValueError for wrong shapes, dtypes, devices or eps, or a plan of other shapes or devices.
    Source: docs/method.md section 4, the group lasso of arXiv 2412.14426.

    >>> factor = torch.tensor([[3.0, 4.0], [6.0, 8.0]])
    >>> rows = [(0, torch.tensor([0, 1]))]  # each row is a group
    >>> group_lasso([factor], rows, removed=torch.tensor([True, False]))
    tensor(5.)
    """
    check_eps(eps)
    return op.lasso(factors, _plan(factors, groups, removed), removed, float(eps), backend)


@typed
def group_lasso_grad_(
    factors: Sequence[Tensor],
    groups: Groups | GroupPlan,
    removed: Tensor,
    *,
    weight: float | Tensor = 1.0,
    eps: float = 1e-8,
    backend: str = "auto",
) -> Tensor:
    """`group_lasso`, and weight * its gradient added to every factor's `.grad` in place, in one call without autograd.

    Does what value = group_lasso(...), (weight * value).backward() does, up to rounding, at a fraction of the cost:
    autograd's own work on hundreds of factors takes longer than the arithmetic. Returns the value, not weighted and
    without a graph. factors: leaves, of which those that require a gradient get one; a `.grad` of None is created.
    groups, removed and eps as in `group_lasso`; weight: a number or a floating 0-d tensor on the factors' device,
    itself without gradient. Outside removed groups exactly zero is added. Autograd's hooks are not called, so call it
    after the backward pass and, in data parallel, after the gradients are reduced: it is the same on every rank.
    Gradients that a GradScaler scaled need its scale in `weight`. Raises ValueError as `group_lasso` does, for a wrong
    weight and for a factor that is no leaf and retains no gradient; RuntimeError for a factor given twice.
    Source: docs/method.md section 4, the group lasso of arXiv 2412.14426, differentiated.

    >>> factor = torch.tensor([[3.0, 4.0], [6.0, 8.0]], requires_grad=True)
    >>> group_lasso_grad_([factor], [(0, torch.tensor([0, 1]))], torch.tensor([True, False]), weight=10.0)
    tensor(5.)
    >>> factor.grad
    tensor([[6., 8.],
            [0., 0.]])
    """
    check_eps(eps)
    plan = _plan(factors, groups, removed, fits=False)
    if isinstance(weight, Tensor) and (
        weight.ndim != 0 or not weight.is_floating_point() or weight.device != removed.device
    ):
        given = f"{weight.dtype} of shape {list(weight.shape)} on {weight.device}"
        raise ValueError(f"weight is {given}: give a number or a floating 0-d tensor on {removed.device}.")
    with torch.no_grad():
        return op.lasso_grad_(factors, plan, removed, weight, float(eps), backend)


@typed
def group_prox_(
    factors: Sequence[Tensor],
    groups: Groups | GroupPlan,
    removed: Tensor,
    threshold: float | Tensor,
    *,
    backend: str = "auto",
) -> None:
    """In place, without gradient: each removed group <- group * max(0, 1 - threshold / ||group||).

    factors, groups and removed as in `group_lasso`; threshold: a number of at least 0 or a floating tensor [n_groups].
    A group whose norm is at or below its threshold becomes exactly zero. Raises ValueError for wrong shapes, dtypes or
    devices and for factors with several elements in one place of memory, RuntimeError for a factor given twice.
    Source: the proximal operator of the group 2-norm, docs/method.md section 4.

    >>> factor = torch.tensor([[3.0, 4.0], [6.0, 8.0]])
    >>> group_prox_([factor], [(0, torch.tensor([0, 1]))], torch.tensor([True, False]), threshold=2.5)
    >>> factor
    tensor([[1.5000, 2.0000],
            [6.0000, 8.0000]])
    """
    plan = _plan(factors, groups, removed)
    if not torch.compiler.is_compiling():
        check_written(factors)
    if isinstance(threshold, Tensor):
        if threshold.shape != removed.shape:
            needed = list(removed.shape)
            raise ValueError(f"threshold has shape {list(threshold.shape)}: give a number, or one per group, {needed}.")
        if not threshold.is_floating_point() or threshold.device != removed.device:
            given = f"{threshold.dtype} on {threshold.device}"
            raise ValueError(f"threshold is {given}: give a number, or a floating tensor on {removed.device}.")
    elif not threshold >= 0:
        raise ValueError(f"threshold is {float(threshold)}: give a number of at least 0.")
    else:
        threshold = torch.full(removed.shape, float(threshold), dtype=op.wide(factors), device=removed.device)
    with torch.no_grad():
        op.prox_(factors, plan, removed, threshold.to(op.wide(factors)), backend)


def _plan(factors: Sequence[Tensor], groups: Groups | GroupPlan, removed: Tensor, *, fits: bool = True) -> GroupPlan:
    """The plan of a call, checked against its `removed` and, with `fits`, against its factors."""
    if removed.dtype != torch.bool or removed.ndim != 1:
        raise ValueError(f"removed must be a 1-D bool tensor, not {removed.dtype} of shape {list(removed.shape)}.")
    if isinstance(groups, GroupPlan):
        plan = groups
        if not plan._checked:
            raise ValueError("the plan was put together by hand: make it with GroupPlan.of.")
        if fits or not factors:
            plan.check(factors)
        if removed.shape[0] != plan.n_groups:
            raise ValueError(f"removed has {removed.shape[0]} entries, but the plan has {plan.n_groups} groups.")
    else:
        plan = GroupPlan.of(factors, groups, removed.shape[0])
    if removed.device != plan.device:
        raise ValueError(f"removed is on {removed.device} and the factors on {plan.device}: use one device.")
    return plan
