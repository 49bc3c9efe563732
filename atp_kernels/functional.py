"""What a user calls: checks, automatic casting and the choice between eager and compiled execution."""

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from atp_kernels import ops
from atp_kernels.checks import check_eps, check_places, check_range, check_written
from atp_kernels.plan import GroupPlan
from atp_kernels.reference import Groups


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
    group that owns nothing counts nothing. Returns a float32 scalar (float64 if a factor is), differentiable once in
    the factors. Raises ValueError for wrong shapes, dtypes, devices or eps, or a plan of other shapes or devices.
    Source: arXiv 2412.14426, section 3 (the L_GL term).
    """
    check_eps(eps)
    return ops.lasso(factors, _plan(factors, groups, removed), removed, float(eps), backend)


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

    As value = group_lasso(...), (weight * value).backward() to rounding, at a fraction of the cost: autograd's own work
    on hundreds of factors takes longer than the arithmetic. Returns the value, not weighted and without a graph.
    factors: leaves, of which those that require a gradient get one; `.grad` is made where it is None. groups, removed
    and eps as in `group_lasso`; weight: a number or a floating 0-d tensor on the factors' device, itself without
    gradient. What is added outside removed groups is exactly zero. Hooks of autograd are not called, so call it after
    the backward pass and, in data parallel, after the gradients were reduced: it is the same on every rank. Gradients
    that a GradScaler scaled need its scale in `weight`. Raises ValueError as `group_lasso` does, for a wrong weight and
    for a factor that is no leaf and retains no gradient; RuntimeError for a factor given twice.
    Source: arXiv 2412.14426, section 3 (the L_GL term), differentiated.
    """
    check_eps(eps)
    plan = _plan(factors, groups, removed, fits=False)
    if not isinstance(weight, Tensor):
        make = torch.full if torch.compiler.is_compiling() else _full
        weight = make((), float(weight), device=removed.device)
    elif weight.ndim != 0 or not weight.is_floating_point() or weight.device != removed.device:
        given = f"{weight.dtype} of shape {list(weight.shape)} on {weight.device}"
        raise ValueError(f"weight is {given}: give a number or a floating 0-d tensor on {removed.device}.")
    with torch.no_grad():
        return ops.lasso_grad_(factors, plan, removed, weight, float(eps), backend)


def group_prox_(
    factors: Sequence[Tensor],
    groups: Groups | GroupPlan,
    removed: Tensor,
    threshold: float | Tensor,
    *,
    backend: str = "auto",
) -> None:
    """In place, without gradient: each removed group <- group * max(0, 1 - threshold / ||group||).

    factors, groups and removed as in `group_lasso`; threshold: a number from 0 on or a floating tensor [n_groups]. A
    group whose norm is at or below its threshold becomes exactly zero. Raises ValueError for wrong shapes, dtypes or
    devices and for factors that repeat one place of memory, RuntimeError for a factor given twice.
    Source: the proximal operator of the group 2-norm.
    """
    plan = _plan(factors, groups, removed)
    if not torch.compiler.is_compiling():
        check_written(factors)
    if isinstance(threshold, Tensor):
        if threshold.shape != removed.shape:
            given, needed = list(threshold.shape), list(removed.shape)
            raise ValueError(f"threshold has shape {given}: give a number, or one for each group, {needed}.")
        if not threshold.is_floating_point() or threshold.device != removed.device:
            given = f"{threshold.dtype} on {threshold.device}"
            raise ValueError(f"threshold is {given}: give a number, or a floating tensor on {removed.device}.")
    elif not threshold >= 0:
        raise ValueError(f"threshold is {float(threshold)}: give a number of at least 0.")
    else:
        threshold = torch.full(removed.shape, float(threshold), device=removed.device)
    with torch.no_grad():
        ops.prox_(factors, plan, removed, threshold.float(), backend)


def compact(
    weight: Tensor,
    rows: Tensor | None = None,
    cols: Tensor | None = None,
    pad_to: int = 1,
    *,
    backend: str = "auto",
) -> Tensor:
    """The kept rows and columns of a weight as a new tensor, without gradient.

    weight [n, k]; rows and cols: int64 index vectors, None for all. Returns [n', k'], where a gathered side is padded
    with zeros to a multiple of `pad_to` and the other side is as it was. Waits for the device to look at the indices.
    Raises ValueError for wrong shapes, dtypes or devices, or an index that is negative or too large.
    """
    if weight.ndim != 2:
        raise ValueError(f"compact takes a 2-D weight, not one of shape {list(weight.shape)}.")
    for name, index in (("rows", rows), ("cols", cols)):
        if index is not None and (index.ndim != 1 or index.dtype != torch.int64 or index.device != weight.device):
            raise ValueError(f"{name} must be a 1-D int64 tensor on {weight.device}, or None for all.")
    for axis, (name, index) in enumerate((("rows holds", rows), ("cols holds", cols))):
        if index is not None:
            check_range(name, index, weight.shape[axis], "index")
    if pad_to < 1:
        raise ValueError(f"pad_to is {pad_to}: give a positive multiple, 1 for no padding.")
    return ops.compact_op(weight.detach(), rows, cols, pad_to, backend)


def cross_entropy_(logits: Tensor, targets: Tensor, *, backend: str = "auto") -> Tensor:
    """-log softmax(logits)[target] of each row; the gradient of their sum takes the place of the logits.

    logits [rows, vocab], floating, becomes softmax(logits) - onehot(target), rounded once; targets int64 [rows], from 0
    to vocab - 1. Returns [rows], float32 (float64 for float64), and softmax is computed in that dtype. For autograd
    functions of one's own: this one records nothing. Raises ValueError for wrong shapes, dtypes or devices, for logits
    that ask for a gradient or repeat one place of memory, and on a CPU for a target out of range.
    """
    if logits.ndim != 2 or not logits.is_floating_point() or logits.shape[1] == 0:
        raise ValueError(f"logits are {logits.dtype} of shape {list(logits.shape)}: give floating ones [rows, vocab].")
    if targets.shape != logits.shape[:1] or targets.dtype != torch.int64 or targets.device != logits.device:
        given = f"{targets.dtype} of shape {list(targets.shape)} on {targets.device}"
        raise ValueError(f"targets are {given}, but the logits need int64 [{logits.shape[0]}] on {logits.device}.")
    if logits.requires_grad and torch.is_grad_enabled():
        raise ValueError("cross_entropy_ writes over its logits and they require a gradient: call it on detached ones.")
    check_places("logits", logits)
    try:
        return ops.cross_entropy_op(logits, targets, backend)
    except RuntimeError:
        # Only now, since looking at every target is a read that a training step has no need of.
        if targets.device.type == "cpu":
            check_range("targets hold", targets, logits.shape[1], "target")
        raise


# The weight of a step is that of the step before.
_full = functools.lru_cache(maxsize=16)(torch.full)


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
