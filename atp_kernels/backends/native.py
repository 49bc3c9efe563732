"""The `native` backend: C++ operations from the optional extension atp_kernels._C.

Group operations take all factors of a model at once; the linear is the reference backend's around the vendor's matrix
products, with its masks, column sums, gathers and dropout in C++ (on a CPU), and so is SiLU between the linears of a
gated MLP.

Results do not depend on the number of threads or on the processor's instruction set. All functions are numerics only:
they record no gradient. Non-contiguous tensors are copied, and copied back where the operation works in place.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from atp_kernels import extension
from atp_kernels.call import Call
from atp_kernels.checks import check_written
from atp_kernels.plan import GroupPlan

__all__ = [
    "compact",
    "cross_entropy_",
    "group_lasso_backward",
    "group_lasso_forward",
    "group_lasso_grad_",
    "group_prox_",
    "separate_lasso_backward",
    "separate_lasso_forward",
]


_ON_CUDA = ("group_lasso", "group_lasso_grad_", "group_prox_", "compact")


def supports(call: Call) -> str | None:
    return extension.refuses(call, cuda=call.op in _ON_CUDA)


@torch.no_grad()
def group_lasso_forward(
    factors: Sequence[Tensor], plan: GroupPlan, removed: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """Return (value [], norms [n_groups]), float32: norms = sqrt(sum of squares + eps) of every group, value their sum
    over removed groups that own at least one row or column.

    factors: 2-D float32 or bfloat16, summed in float32 within a row and in float64 within a group, whose norm is then
    rounded to float32; removed bool [n_groups]. Raises RuntimeError for wrong dtypes or shapes.
    """
    held = [factor.contiguous() for factor in factors]
    packed = (plan.axes, plan._index, plan._order, plan._starts)
    return extension.on_device(extension.ops.group_lasso_forward, held, *packed, removed.contiguous(), eps)


@torch.no_grad()
def group_lasso_backward(
    factors: Sequence[Tensor], plan: GroupPlan, removed: Tensor, norms: Tensor, grad_out: Tensor
) -> list[Tensor]:
    """Return one gradient a factor, in its dtype: grad_out * entry / norm of its group if removed, else exactly zero.

    norms [n_groups] float32 from `group_lasso_forward`; grad_out: one floating element. Where a norm is zero (eps = 0)
    the gradient is zero. The gradients are pieces of one allocation. Raises RuntimeError as `group_lasso_forward` does.
    """
    held = [factor.contiguous() for factor in factors]
    vectors = (removed.contiguous(), norms.contiguous(), grad_out.float())
    return extension.on_device(extension.ops.group_lasso_backward, held, plan.axes, plan._index, *vectors)


def separate_lasso_forward(
    factors: Sequence[Tensor], plan: GroupPlan, removed: Tensor, eps: float, with_direction: bool
) -> tuple[Tensor, Tensor]:
    """Return (value [], direction) of a separate plan: the value of `group_lasso_forward`, and its gradient.

    factors: on a CPU, all float32 or all bfloat16. direction: entry / norm of its row or column if removed (zero at a
    norm of zero), else exactly zero, of all factors in one 1-D tensor of their dtype, each from a multiple of 64 on; of
    size 0 unless `with_direction`. Raises RuntimeError for wrong dtypes or shapes.
    """
    held = [factor.contiguous() for factor in factors]
    return extension.ops.separate_lasso_forward(held, plan.axes, removed.contiguous(), eps, with_direction)


def separate_lasso_backward(direction: Tensor, plan: GroupPlan, grad_out: Tensor, in_place: bool) -> list[Tensor]:
    """Return grad_out * direction as one gradient a factor, pieces of one allocation: `direction` itself if `in_place`.

    grad_out: one floating element. Raises RuntimeError for a `direction` of another plan.
    """
    return extension.ops.separate_lasso_backward(direction, plan.sides, grad_out.float(), in_place)


@torch.no_grad()
def group_lasso_grad_(
    factors: Sequence[Tensor], grads: Sequence[Tensor], plan: GroupPlan, removed: Tensor, weight: Tensor, eps: float
) -> Tensor:
    """Return the value of `group_lasso_forward`; grads += weight * entry / norm of its group if removed, else nothing.

    grads: one of the shape and dtype of every factor; the sum is rounded once. weight: one floating element. On a CPU a
    plan of runs takes one sweep over factors and gradients, another one over factors and then one over both. Raises
    ValueError for factors that do not fit the plan, RuntimeError as `group_lasso_forward` does and for a gradient that
    is given twice.
    """
    packed = (plan.axes, plan._index, plan._order, plan._starts)
    vectors = (removed.contiguous(), weight.float())
    if plan._index.is_cuda:
        plan.check(factors)
    try:
        # On a CPU another look at hundreds of tensors would cost a tenth of the call: all are made by the extension.
        value = extension.on_device(
            extension.ops.group_lasso_grad_, factors, grads, *packed, plan.sides, *vectors, eps, plan.runs
        )
    except RuntimeError:
        plan.check(factors)  # says it in its own words
        check_written(grads, "gradients")
        raise
    torch.autograd.graph.increment_version(grads)
    return value


@torch.no_grad()
def group_prox_(factors: Sequence[Tensor], plan: GroupPlan, removed: Tensor, threshold: Tensor) -> None:
    """In place: each removed group <- group * max(0, 1 - threshold / ||group||).

    threshold: floating [n_groups], used in float32; a group at or below it becomes exactly zero. Raises RuntimeError as
    `group_lasso_forward` does, and for a tensor that is given twice.
    """
    held = [factor.contiguous() for factor in factors]
    packed = (plan.axes, plan._index, plan._order, plan._starts)
    extension.on_device(extension.ops.group_prox_, held, *packed, removed.contiguous(), threshold.float().contiguous())
    for factor, copy in zip(factors, held, strict=True):
        if factor is not copy:
            factor.copy_(copy)
    # The extension writes behind autograd's back: tell it, so that a stale saved tensor raises instead of lying.
    torch.autograd.graph.increment_version(factors)


@torch.no_grad()
def compact(weight: Tensor, rows: Tensor | None = None, cols: Tensor | None = None, pad_to: int = 1) -> Tensor:
    """Return the kept rows and columns of a weight, each gathered side zero-padded to a multiple of `pad_to`.

    weight [n, k] of any dtype of 1 to 8 bytes; rows, cols: int64 vectors or None for all. Raises RuntimeError for an
    index out of range.
    """
    rows, cols = (index if index is None else index.contiguous() for index in (rows, cols))
    return extension.on_device(extension.ops.compact, weight.contiguous(), rows, cols, pad_to)


def cross_entropy_(logits: Tensor, targets: Tensor) -> Tensor:
    """`reference.cross_entropy_` of float32 or bfloat16, a row at a time, its sum in float32 and then in float64.

    Raises RuntimeError for a target outside the vocabulary.
    """
    held = logits.contiguous()
    losses = extension.ops.cross_entropy_(held, targets.contiguous())
    if held is not logits:
        logits.copy_(held)
    return losses
