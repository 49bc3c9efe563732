"""torch.library registration and eager short cut of the operations on groups of many factors, and of `compact`."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from atp_kernels.backends.dispatch import select
from atp_kernels.ops.common import common_dtype, refuse_twice
from atp_kernels.reference import Groups, round_up


def lasso(factors: Sequence[Tensor], groups: Groups, removed: Tensor, eps: float, backend: str) -> Tensor:
    """Group lasso of all factors, checked."""
    axes, indices = zip(*groups, strict=True)
    if not torch.compiler.is_compiling():
        return GroupLasso.apply(axes, indices, removed, eps, backend, *factors)
    return group_lasso_op(list(factors), list(axes), list(indices), removed, eps, backend)[0]


@torch.library.custom_op("atp_kernels::group_lasso", mutates_args=())
def group_lasso_op(
    factors: Sequence[Tensor],
    axes: Sequence[int],
    indices: Sequence[Tensor],
    removed: Tensor,
    eps: float,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """(value, norms [n_groups]) of all factors together."""
    module = select("group_lasso", removed.device, common_dtype(factors), backend)[0]
    return module.group_lasso_forward(factors, list(zip(axes, indices, strict=True)), removed, eps)


@group_lasso_op.register_fake
def _(factors, axes, indices, removed, eps, backend):
    wide = torch.float64 if common_dtype(factors) == torch.float64 else torch.float32
    return removed.new_empty((), dtype=wide), removed.new_empty(removed.shape, dtype=wide)


@torch.library.custom_op("atp_kernels::group_lasso_backward", mutates_args=())
def group_lasso_backward_op(
    factors: Sequence[Tensor],
    axes: Sequence[int],
    indices: Sequence[Tensor],
    removed: Tensor,
    norms: Tensor,
    grad_value: Tensor,
    backend: str,
) -> list[Tensor]:
    """The gradient of every factor."""
    module = select("group_lasso", removed.device, common_dtype(factors), backend)[0]
    return module.group_lasso_backward(factors, list(zip(axes, indices, strict=True)), removed, norms, grad_value)


@group_lasso_backward_op.register_fake
def _(factors, axes, indices, removed, norms, grad_value, backend):
    return [torch.empty_like(factor) for factor in factors]


def _lasso_setup(ctx, inputs, output) -> None:
    factors, ctx.axes, indices, removed, _, ctx.backend = inputs
    ctx.n_factors = len(factors)
    ctx.save_for_backward(*factors, *indices, removed, output[1])


def _lasso_backward(ctx, grad_value, grad_norms):
    *tensors, removed, norms = ctx.saved_tensors
    factors, indices = tensors[: ctx.n_factors], tensors[ctx.n_factors :]
    grads = group_lasso_backward_op(factors, ctx.axes, indices, removed, norms, grad_value, ctx.backend)
    return grads, None, [None] * len(indices), None, None, None


group_lasso_op.register_autograd(_lasso_backward, setup_context=_lasso_setup)
group_lasso_backward_op.register_autograd(refuse_twice)


@torch.library.custom_op("atp_kernels::group_prox_", mutates_args=("factors",))
def group_prox_op(
    factors: Sequence[Tensor],
    axes: Sequence[int],
    indices: Sequence[Tensor],
    removed: Tensor,
    threshold: Tensor,
    backend: str,
) -> None:
    """Shrink removed groups in place by a threshold each, [n_groups]."""
    module = select("group_prox_", removed.device, common_dtype(factors), backend)[0]
    module.group_prox_(factors, list(zip(axes, indices, strict=True)), removed, threshold)


@group_prox_op.register_fake
def _(factors, axes, indices, removed, threshold, backend):
    return None


@torch.library.custom_op("atp_kernels::compact", mutates_args=())
def compact_op(weight: Tensor, rows: Tensor | None, cols: Tensor | None, pad_to: int, backend: str) -> Tensor:
    """The kept rows and columns, gathered sides padded with zeros."""
    return select("compact", weight.device, weight.dtype, backend)[0].compact(weight, rows, cols, pad_to)


@compact_op.register_fake
def _(weight, rows, cols, pad_to, backend):
    n_rows = weight.shape[0] if rows is None else round_up(rows.shape[0], pad_to)
    n_cols = weight.shape[1] if cols is None else round_up(cols.shape[0], pad_to)
    return weight.new_empty(n_rows, n_cols)


class GroupLasso(torch.autograd.Function):
    """Eager group lasso over all factors at once."""

    @staticmethod
    def forward(ctx, axes, indices, removed, eps, backend, *factors):
        module = select("group_lasso", factors[0].device, common_dtype(factors), backend)[0]
        ctx.groups, ctx.module = list(zip(axes, indices, strict=True)), module
        value, norms = module.group_lasso_forward(factors, ctx.groups, removed, eps)
        ctx.save_for_backward(removed, norms, *factors)
        return value

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_value):
        removed, norms, *factors = ctx.saved_tensors
        grads = ctx.module.group_lasso_backward(factors, ctx.groups, removed, norms, grad_value)
        return (None, None, None, None, None, *grads)
