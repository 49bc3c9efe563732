"""What a user calls: checks, automatic casting and the choice between eager and compiled execution."""

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from atp_kernels import ops
from atp_kernels.call import select
from atp_kernels.checks import check_dropout, check_eps, check_linear, check_places, check_range, check_written
from atp_kernels.plan import GroupPlan
from atp_kernels.reference import Groups

_NARROWED = (torch.float32, torch.bfloat16)  # the dtypes from which and to which a weight is cast and merged at once


def masked_lora_linear(
    x: Tensor,
    weight: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    *,
    scaling: float,
    out_mask: Tensor | None = None,
    in_mask: Tensor | None = None,
    mask_lora: bool = False,
    bias: Tensor | None = None,
    lora_input: Tensor | None = None,
    dropout: float = 0.0,
    seed: int | Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """y = m_out * ((m_in * x) W^T + bias) + scaling * (lora_input A^T) B^T, with all its gradients.

    With `mask_lora` the output mask covers the sum and the adapter reads the in-masked input too.

    x [..., in]; weight [out, in]; lora_a [r, in]; lora_b [out, r]; out_mask [out]; in_mask [in]; bias [out];
    lora_input like x (default x). Returns [..., out] in the dtype of x. Masks are bool (hard, constant) or floating
    (soft, differentiable, used in float32 whatever x is). x and weight share a dtype; the factors, bias and lora_input
    are cast to it. Under autocast all but the masks are cast to the autocast dtype; there a constant adapter may be
    added to a float32 weight before the cast, which rounds once where two paths round twice.
    `dropout` p in [0, 1) makes lora_input = keep * x / (1 - p), in place of a given one, and gradients flow to x
    through the same keep. Seeing x as a matrix, element (m, k) is kept where word k % 4 of Philox-4x32-7 with counter
    (m, k // 4, 0, 0) and key `seed` is at least floor(p * 2^32), so that backward draws it again and nothing of it is
    stored. `seed`: an int64 as an int, or as a 0-d CPU tensor, for which torch.compile compiles once; a seed drops the
    same elements each time, so give each call of a step one of its own, and leave a tensor as it is until backward.
    Differentiable once in every floating input that requires it. Raises ValueError for wrong shapes, dtypes, devices or
    dropout and RuntimeError for a named backend that cannot take the call.
    Source: arXiv 2412.14426, section 3; Philox: Salmon et al. 2011.
    """
    if dropout != 0:
        check_dropout(dropout, seed, lora_input)
    operands = (x, weight, lora_a, lora_b, bias, lora_input, out_mask, in_mask)
    if dropout == 0 and (mask_lora or (out_mask is None and in_mask is None)):
        tensors = prepare_linear(*operands, merge=float(scaling), backend=backend)
    else:
        tensors = prepare_linear(*operands)
    return ops.linear(tensors, float(scaling), mask_lora, False, float(dropout), seed, backend)


def masked_lora_linear_with_norms(
    x: Tensor,
    weight: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    *,
    scaling: float,
    out_mask: Tensor | None = None,
    in_mask: Tensor | None = None,
    mask_lora: bool = False,
    bias: Tensor | None = None,
    lora_input: Tensor | None = None,
    dropout: float = 0.0,
    seed: int | Tensor | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor, Tensor]:
    """`masked_lora_linear`, and the squared norms of B's rows and A's columns from the same pass.

    Returns (y [..., out], b_row_sq [out], a_col_sq [in]); the norms are float32 (float64 in float64), of the factors
    as the pass reads them (after any cast), and differentiable in A and B. Errors as in `masked_lora_linear`.
    """
    if dropout != 0:
        check_dropout(dropout, seed, lora_input)
    tensors = prepare_linear(x, weight, lora_a, lora_b, bias, lora_input, out_mask, in_mask)
    return ops.linear(tensors, float(scaling), mask_lora, True, float(dropout), seed, backend)


def lora_dropout(x: Tensor, p: float, seed: int | Tensor, *, backend: str = "auto") -> Tensor:
    """keep * x / (1 - p): what `masked_lora_linear` with this dropout and seed hands to its adapter, on its own.

    x [..., K], floating; p in [0, 1); `keep` and `seed` as in `masked_lora_linear`. Returns a tensor like x.
    Differentiable: the gradient is the same dropout of the gradient, drawn again, and nothing of x or keep is stored.
    Raises ValueError for a wrong dtype, p or seed and RuntimeError for a named backend that cannot take the call.
    Source: Srivastava et al. 2014; Philox: Salmon et al. 2011.
    """
    check_dropout(p, seed, None)
    if x.ndim == 0 or not x.is_floating_point():
        raise ValueError(f"x is {x.dtype} of shape {list(x.shape)}: give a floating tensor [..., K].")
    return ops.dropped(x, float(p), seed, backend) if p else x


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


def prepare_linear(
    x, weight, lora_a, lora_b, bias, lora_input, out_mask, in_mask, *, merge: float | None = None, backend: str = "auto"
) -> tuple[Tensor | None, ...]:
    """Check the operands of a linear and cast them as autocast and the dtype rules ask.

    `merge` is the scaling of an adapter that reads and feeds what the base does, None of another. Where autocast casts
    such a linear anyway and the adapter is constant, it becomes part of the weight on the way, if `backend` has a
    kernel for that, and factors of rank 0 stand for it.
    """
    lora_input = None if lora_input is x else lora_input
    ready = _are_ready(x, weight, lora_a, lora_b, bias, lora_input, out_mask, in_mask)
    if not ready:
        check_linear(x, weight, lora_a, lora_b, bias, lora_input, out_mask, in_mask)
    dtype = x.dtype
    if torch.is_autocast_enabled(x.device.type) and dtype != torch.float64:
        dtype = torch.get_autocast_dtype(x.device.type)
        x = x.to(dtype)
        mergeable = merge is not None and lora_input is None
        merged = _merged(weight, lora_a, lora_b, merge, dtype, backend) if mergeable else None
        weight, lora_a, lora_b = merged or (weight.to(dtype), lora_a, lora_b)
    elif ready:
        return x, weight, lora_a, lora_b, bias, lora_input, out_mask, in_mask
    elif weight.dtype != dtype:
        raise ValueError(f"weight is {weight.dtype} and x is {dtype}: cast one of them, or run under torch.autocast.")
    lora_a, lora_b, bias = _cast(lora_a, dtype), _cast(lora_b, dtype), _cast(bias, dtype)
    lora_input = _cast(lora_input, dtype)
    return x, weight, lora_a, lora_b, bias, lora_input, _as_mask(out_mask, dtype), _as_mask(in_mask, dtype)


def _merged(
    weight: Tensor, lora_a: Tensor, lora_b: Tensor, scaling: float, dtype: torch.dtype, backend: str
) -> tuple[Tensor, Tensor, Tensor] | None:
    """(weight + scaling * lora_b lora_a in `dtype`, factors of rank 0) of a constant adapter, None of another.

    None too where no kernel makes it at the cost of the cast, and for a compiler, which fuses casts by itself.
    """
    if torch.compiler.is_compiling() or weight.device.type != "cpu" or (weight.dtype, dtype) != _NARROWED:
        return None
    if torch.is_grad_enabled() and (weight.requires_grad or lora_a.requires_grad or lora_b.requires_grad):
        return None
    module = select("masked_lora_linear", weight.device, dtype, backend)[0]
    if not hasattr(module, "merged_weight"):
        return None
    return module.merged_weight(weight, lora_a, lora_b, scaling), lora_a[:0], lora_b[:, :0]


def _are_ready(x, weight, lora_a, lora_b, bias, lora_input, out_mask, in_mask) -> bool:
    """Whether the operands need neither a cast nor a word from `check_linear`, in as few comparisons as that takes.

    Eager code makes hundreds of calls a step, and nearly all of them pass here.
    """
    dtype, device = x.dtype, x.device
    if not dtype.is_floating_point or x.ndim == 0 or weight.ndim != 2 or lora_a.ndim != 2:
        return False
    (n_out, n_in), (rank, adapter_in) = weight.shape, lora_a.shape
    masks = (torch.bool, torch.float64 if dtype == torch.float64 else torch.float32)
    return (
        x.shape[-1] == n_in == adapter_in
        and lora_b.shape == (n_out, rank)
        and weight.dtype == lora_a.dtype == lora_b.dtype == dtype
        and weight.device == lora_a.device == lora_b.device == device
        and (bias is None or _is(bias, (n_out,), device, (dtype,)))
        and (lora_input is None or _is(lora_input, x.shape, device, (dtype,)))
        and (out_mask is None or _is(out_mask, (n_out,), device, masks))
        and (in_mask is None or _is(in_mask, (n_in,), device, masks))
    )


def _is(tensor: Tensor, shape: Sequence[int], device: torch.device, dtypes: tuple[torch.dtype, ...]) -> bool:
    return tensor.shape == shape and tensor.device == device and tensor.dtype in dtypes


def _cast(tensor: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    # Asked first, because a `to` that does nothing is a call into ATen all the same.
    return tensor if tensor is None or tensor.dtype == dtype else tensor.to(dtype)


def _as_mask(mask: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """Hard masks stay bool; soft ones are used in float32 (float64 beside float64)."""
    if mask is None or mask.dtype == torch.bool:
        return mask
    return mask.to(torch.float64 if dtype == torch.float64 else torch.float32)


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
