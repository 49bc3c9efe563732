"""Group lasso, its gradient and its proximal step in C++ (csrc/cpu/group.cpp, csrc/cuda/group.cu).

All factors of a model are handed over at once. Non-contiguous tensors are copied, and copied back where the operation
works in place. No gradient is recorded.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from atp_kernels import extension
from atp_kernels.call import Call
from atp_kernels.checks import check_written, refuse_capture
from atp_kernels.groups.plan import GroupPlan


def supports(call: Call) -> str | None:
    """float32 and bfloat16 on a CPU, and on CUDA devices that the extension was built for."""
    return extension.refuses(call, cuda=True)


@torch.no_grad()
def group_lasso_forward(
    factors: Sequence[Tensor], plan: GroupPlan, removed: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """As `aten.group_lasso_forward`: float32 sums within a row or column, float64 within a group, norms in float32.

    Raises RuntimeError for wrong dtypes or shapes.
    """
    held = [factor.contiguous() for factor in factors]
    return extension.on_device(extension.ops.group_lasso_forward, held, *_packed(plan), removed.contiguous(), eps)


@torch.no_grad()
def group_lasso_backward(
    factors: Sequence[Tensor], plan: GroupPlan, removed: Tensor, norms: Tensor, grad_out: Tensor
) -> list[Tensor]:
    """As `aten.group_lasso_backward`; the gradients are pieces of one allocation.

    norms: float32, from `group_lasso_forward`; grad_out: one floating element. Raises as `group_lasso_forward` does.
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
    """Return grad_out * direction as one gradient per factor, pieces of one allocation: `direction` if `in_place`.

    grad_out: one floating element. Raises RuntimeError for a `direction` of another plan.
    """
    return extension.ops.separate_lasso_backward(direction, plan.sides, grad_out.float(), in_place)


@torch.no_grad()
def group_lasso_grad_(
    factors: Sequence[Tensor], grads: Sequence[Tensor], plan: GroupPlan, removed: Tensor, weight: Tensor, eps: float
) -> Tensor:
    """As `aten.group_lasso_grad_`, with each sum rounded once. weight: one floating element.

    On a CPU a plan of runs takes one sweep over factors and gradients, any other plan one over factors and then one
    over both. Raises RuntimeError as `group_lasso_forward` does.
    """
    vectors = (removed.contiguous(), weight.float())
    in_one_piece = all(map(Tensor.is_contiguous, grads))
    if plan._index.is_cuda or not in_one_piece:
        plan.check(factors)
    if not in_one_piece:
        check_written(grads, "gradients")  # what is added to a copy must have places of its own to go back to
    try:
        # On a CPU the extension makes all checks: a second look at hundreds of tensors would cost a tenth of the call.
        value = extension.on_device(
            extension.ops.group_lasso_grad_, factors, grads, *_packed(plan), plan.sides, *vectors, eps, plan.runs
        )
    except RuntimeError:
        plan.check(factors)  # says it in its own words
        check_written(grads, "gradients")
        raise
    torch.autograd.graph.increment_version(grads)
    return value


@torch.no_grad()
def group_prox_(factors: Sequence[Tensor], plan: GroupPlan, removed: Tensor, threshold: Tensor) -> None:
    """As `aten.group_prox_`, in float32. Raises as `group_lasso_forward` does, and for a tensor that is given twice."""
    held = [factor.contiguous() for factor in factors]
    vectors = (removed.contiguous(), threshold.float().contiguous())
    extension.on_device(extension.ops.group_prox_, held, *_packed(plan), *vectors)
    for factor, copy in zip(factors, held, strict=True):
        if factor is not copy:
            factor.copy_(copy)
    # The extension writes behind autograd's back: tell it, so that a stale saved tensor raises instead of lying.
    torch.autograd.graph.increment_version(factors)


def _packed(plan: GroupPlan) -> tuple[tuple[int, ...], Tensor, Tensor, Tensor]:
    """What a plan is made of, as the extension takes it, which copies a table of the factors in every call."""
    refuse_capture(plan.device, "the native group operations, whose tables are on the host", "use backend='triton'")
    return plan.axes, plan._index, plan._order, plan._starts
