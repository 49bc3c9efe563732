"""The operations on groups of many factors: torch.library schema, fake and autograd, and eager Functions.

A training step makes its calls eagerly: an `autograd.Function` over the backend costs less than the dispatcher's Python
layer. A compiled or exported program sees the registered operators `torch.ops.atp_kernels.*`.
"""

import functools
from collections.abc import Sequence
from operator import attrgetter
from typing import cast

import torch
from torch import Tensor

from atp_kernels import checks
from atp_kernels.call import (
    Operation,
    Order,
    common_dtype,
    differentiable_once,
    rarest_dtype,
    refuse_twice,
    register,
    select,
)
from atp_kernels.groups.plan import GroupPlan

_ORDER = {
    "cpu": Order(("native", "reference")),
    # Triton keeps the table of factors on the device, which a CUDA graph needs, and many blocks share the groups; the
    # C++ copies the table in every call and sums the norms in one block.
    "cuda": Order(("triton", "native", "reference")),
}
OPERATIONS = tuple(
    register(Operation(name, __package__, ("reference", "triton", "native"), _ORDER))
    for name in ("group_lasso", "group_lasso_grad_", "group_prox_")
)
UNCAPTURED = (torch.Tag.cudagraph_unsafe,)
"""What keeps a compiler from capturing operators whose tables of factors come from the host in every call."""
TORCH_TOO_NEW = "2.14"
"""The first torch whose private `_get_current_graph_task_keep_graph` no test has seen."""


def lasso(factors: Sequence[Tensor], plan: GroupPlan, removed: Tensor, eps: float, backend: str) -> Tensor:
    """Group lasso of all factors, checked."""
    if torch.compiler.is_compiling():
        return group_lasso_op(list(factors), *_packed(plan), removed, eps, backend)[0]
    dtypes = _dtypes(factors)
    module = select("group_lasso", removed.device, rarest_dtype(dtypes), backend).module
    if plan.separate and len(dtypes) == 1 and hasattr(module, "separate_lasso_forward"):
        return SeparateLasso.apply(module, plan, removed, eps, torch.is_grad_enabled(), *factors)
    return GroupLasso.apply(module, plan, removed, eps, *factors)


def lasso_grad_(
    factors: Sequence[Tensor], plan: GroupPlan, removed: Tensor, weight: float | Tensor, eps: float, backend: str
) -> Tensor:
    """Group lasso of all factors, which the backend checks, and weight times its gradient added to their `.grad`."""
    grads, dtypes = _grads(factors), _dtypes(factors)
    if not isinstance(weight, Tensor):
        # What a CUDA graph makes, eager calls must not find later.
        fresh = torch.compiler.is_compiling() or checks.is_capturing(removed.device)
        weight = (torch.full if fresh else _full)((), float(weight), dtype=_wide(dtypes), device=removed.device)
    if torch.compiler.is_compiling():
        plan.check(factors)
        # Detached, because the operator has no gradient of its own to offer.
        factors = [factor.detach() for factor in factors]
        return group_lasso_grad_op(factors, grads, *_packed(plan), removed, weight, eps, backend)
    module = select("group_lasso_grad_", removed.device, rarest_dtype(dtypes), backend).module
    return module.group_lasso_grad_(factors, grads, plan, removed, weight, eps)


# The weight of one step is usually that of the step before.
_full = functools.lru_cache(maxsize=16)(torch.full)


def wide(factors: Sequence[Tensor]) -> torch.dtype:
    """The dtype of what factors are multiplied by: float32, or float64 where one of them is."""
    return _wide(_dtypes(factors))


def _wide(dtypes: set[torch.dtype]) -> torch.dtype:
    return torch.float64 if torch.float64 in dtypes else torch.float32


def _dtypes(factors: Sequence[Tensor]) -> set[torch.dtype]:
    """The dtypes of the factors. Raises ValueError for one that no gradient can have."""
    found = set(map(attrgetter("dtype"), factors))
    for dtype in found:
        if not dtype.is_floating_point:
            raise ValueError(f"a factor is {dtype}: give floating tensors.")
    return found


def _grads(factors: Sequence[Tensor]) -> list[Tensor]:
    """Where the gradients of all factors are summed up; where all have one, each factor is looked at only twice."""
    if all([factor.requires_grad for factor in factors]):
        grads = [factor.grad for factor in factors]
        if all([grad is not None for grad in grads]):
            return cast(list[Tensor], grads)
    return [_grad(factor) for factor in factors]


def _grad(factor: Tensor) -> Tensor:
    """The `.grad` of a factor, made where it is None; memory that nobody reads if the factor requires no gradient."""
    if not factor.requires_grad:
        return torch.zeros_like(factor)
    if not (factor.is_leaf or factor.retains_grad):
        raise ValueError("a factor is neither a leaf nor retains its gradient: give parameters, or use group_lasso.")
    if factor.grad is None:
        factor.grad = torch.zeros_like(factor)
    return factor.grad


def prox_(factors: Sequence[Tensor], plan: GroupPlan, removed: Tensor, threshold: Tensor, backend: str) -> None:
    """Shrinkage of all factors in place, checked."""
    if torch.compiler.is_compiling():
        group_prox_op(list(factors), *_packed(plan), removed, threshold, backend)
        return
    module = select("group_prox_", removed.device, rarest_dtype(_dtypes(factors)), backend).module
    module.group_prox_(factors, plan, removed, threshold)


def _packed(plan: GroupPlan) -> tuple[list[int], Tensor, Tensor, Tensor]:
    """A plan as the operators take it; `GroupPlan.unpack` is its inverse."""
    return list(plan.axes), plan._index, plan._order, plan._starts


@torch.library.custom_op("atp_kernels::group_lasso", mutates_args=(), tags=UNCAPTURED)
def group_lasso_op(
    factors: Sequence[Tensor],
    axes: Sequence[int],
    index: Tensor,
    order: Tensor,
    starts: Tensor,
    removed: Tensor,
    eps: float,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """(value, norms [n_groups]) of all factors together."""
    module = select("group_lasso", removed.device, common_dtype(factors), backend).module
    return module.group_lasso_forward(factors, GroupPlan.unpack(factors, axes, index, order, starts), removed, eps)


@group_lasso_op.register_fake
def _(factors, axes, index, order, starts, removed, eps, backend):
    wide = torch.float64 if common_dtype(factors) == torch.float64 else torch.float32
    return removed.new_empty((), dtype=wide), removed.new_empty(removed.shape, dtype=wide)


@torch.library.custom_op("atp_kernels::group_lasso_backward", mutates_args=(), tags=UNCAPTURED)
def group_lasso_backward_op(
    factors: Sequence[Tensor],
    axes: Sequence[int],
    index: Tensor,
    order: Tensor,
    starts: Tensor,
    removed: Tensor,
    norms: Tensor,
    grad_value: Tensor,
    backend: str,
) -> list[Tensor]:
    """The gradient of every factor, contiguous and in memory of its own, as torch.library asks."""
    module = select("group_lasso", removed.device, common_dtype(factors), backend).module
    plan = GroupPlan.unpack(factors, axes, index, order, starts)
    grads = module.group_lasso_backward(factors, plan, removed, norms, grad_value)
    return [grad.clone(memory_format=torch.contiguous_format) for grad in grads]


@group_lasso_backward_op.register_fake
def _(factors, axes, index, order, starts, removed, norms, grad_value, backend):
    return [factor.new_empty(factor.shape) for factor in factors]


def _lasso_setup(ctx, inputs, output) -> None:
    factors, ctx.axes, *plan, removed, _, ctx.backend = inputs
    ctx.save_for_backward(*plan, removed, output[1], *factors)


def _lasso_backward(ctx, grad_value, grad_norms):
    index, order, starts, removed, norms, *factors = ctx.saved_tensors
    grads = group_lasso_backward_op(factors, ctx.axes, index, order, starts, removed, norms, grad_value, ctx.backend)
    return grads, None, None, None, None, None, None, None


group_lasso_op.register_autograd(_lasso_backward, setup_context=_lasso_setup)
group_lasso_backward_op.register_autograd(refuse_twice)


@torch.library.custom_op("atp_kernels::group_lasso_grad_", mutates_args=("grads",), tags=UNCAPTURED)
def group_lasso_grad_op(
    factors: Sequence[Tensor],
    grads: Sequence[Tensor],
    axes: Sequence[int],
    index: Tensor,
    order: Tensor,
    starts: Tensor,
    removed: Tensor,
    weight: Tensor,
    eps: float,
    backend: str,
) -> Tensor:
    """The value of all factors together; weight times its gradient is added to grads."""
    module = select("group_lasso_grad_", removed.device, common_dtype(factors), backend).module
    plan = GroupPlan.unpack(factors, axes, index, order, starts)
    return module.group_lasso_grad_(factors, grads, plan, removed, weight, eps)


@group_lasso_grad_op.register_fake
def _(factors, grads, axes, index, order, starts, removed, weight, eps, backend):
    wide = torch.float64 if common_dtype(factors) == torch.float64 else torch.float32
    return removed.new_empty((), dtype=wide)


@torch.library.custom_op("atp_kernels::group_prox_", mutates_args=("factors",), tags=UNCAPTURED)
def group_prox_op(
    factors: Sequence[Tensor],
    axes: Sequence[int],
    index: Tensor,
    order: Tensor,
    starts: Tensor,
    removed: Tensor,
    threshold: Tensor,
    backend: str,
) -> None:
    """Shrink removed groups in place by a threshold each, [n_groups]."""
    module = select("group_prox_", removed.device, common_dtype(factors), backend).module
    module.group_prox_(factors, GroupPlan.unpack(factors, axes, index, order, starts), removed, threshold)


@group_prox_op.register_fake
def _(factors, axes, index, order, starts, removed, threshold, backend):
    return None


def graph_is_kept() -> bool:
    """Whether the backward pass that is running keeps its graph; True on a torch that is too new to be asked.

    torch has no public name for this. The answer True only costs memory.
    """
    if torch.__version__ >= TORCH_TOO_NEW:
        return True
    return torch._C._autograd._get_current_graph_task_keep_graph()


class GroupLasso(torch.autograd.Function):
    """Eager group lasso over all factors at once."""

    @staticmethod
    def forward(ctx, module, plan, removed, eps, *factors):
        ctx.plan, ctx.module = plan, module
        value, norms = module.group_lasso_forward(factors, plan, removed, eps)
        ctx.save_for_backward(removed, norms, *factors)
        return value

    @staticmethod
    @differentiable_once
    def backward(ctx, grad_value):
        removed, norms, *factors = ctx.saved_tensors
        grads = ctx.module.group_lasso_backward(factors, ctx.plan, removed, norms, grad_value)
        return None, None, None, None, *grads


class SeparateLasso(torch.autograd.Function):
    """Eager group lasso of a separate plan, whose forward pass finds the gradient while it holds the factors.

    The gradient for an upstream gradient of 1 is all that is saved: factors may change before the backward pass.
    """

    @staticmethod
    def forward(ctx, module, plan, removed, eps, grad_enabled, *factors):
        ctx.plan, ctx.module = plan, module
        wanted = grad_enabled and any(ctx.needs_input_grad)
        value, direction = module.separate_lasso_forward(factors, plan, removed, eps, wanted)
        ctx.save_for_backward(direction)
        return value

    @staticmethod
    @differentiable_once
    def backward(ctx, grad_value):
        (direction,) = ctx.saved_tensors
        # A kept graph may read the direction again, so gradients must not take its memory.
        in_place = not graph_is_kept()
        grads = ctx.module.separate_lasso_backward(direction, ctx.plan, grad_value, in_place)
        return None, None, None, None, None, *grads
