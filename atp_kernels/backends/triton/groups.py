"""Launching the operations on groups of many factors: one to three kernels, whatever the number of factors.

The table of the factors is built and copied anew by every call, from pinned memory and without waiting for the device:
a factor whose storage has moved since the last call can then never be met by its old address.
"""

from collections.abc import Sequence

import torch
import triton
from torch import Tensor

from atp_kernels.backends.triton import group_kernels as kernels
from atp_kernels.checks import check_written
from atp_kernels.linear import tiles
from atp_kernels.plan import GroupPlan

_Walk = tuple[Tensor, tuple[int, int], dict[str, int | bool]]
"""A table of factors, and the grid and the tile of a kernel over them."""

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@torch.no_grad()
def group_lasso_forward(
    factors: Sequence[Tensor], plan: GroupPlan, removed: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """As `reference.group_lasso_forward`, summed in float32 within a row or column and in float64 within a group."""
    held, removed = [factor.contiguous() for factor in factors], removed.contiguous()
    value = removed.new_empty((), dtype=torch.float32)
    with torch.cuda.device_of(removed):
        norms, parts = _group_norms(_walk(held, held, plan), plan, removed, eps)
        kernels.total_kernel[(1,)](parts, value, parts.numel(), BLOCK=1024)
    return value, norms


@torch.no_grad()
def group_lasso_backward(
    factors: Sequence[Tensor], plan: GroupPlan, removed: Tensor, norms: Tensor, grad_out: Tensor
) -> list[Tensor]:
    """As `reference.group_lasso_backward`; the zeros of kept rows are written without reading them."""
    held, removed = [factor.contiguous() for factor in factors], removed.contiguous()
    grads = [torch.empty_like(factor) for factor in held]
    with torch.cuda.device_of(removed):
        _scale(_walk(held, grads, plan), plan, removed, norms.contiguous(), grad_out.float())
    return grads


@torch.no_grad()
def group_lasso_grad_(
    factors: Sequence[Tensor], grads: Sequence[Tensor], plan: GroupPlan, removed: Tensor, weight: Tensor, eps: float
) -> Tensor:
    """As `reference.group_lasso_grad_`, each sum rounded once; gradients of kept rows are neither read nor written.

    Raises as `check_written` does, and RuntimeError for a gradient that is not of its factor's dtype.
    """
    plan.check(factors)
    check_written(grads, "gradients")
    if any(grad.dtype != factor.dtype for factor, grad in zip(factors, grads, strict=True)):
        raise RuntimeError("a gradient is not of the dtype of its factor: use backend='reference'.")
    held, removed = [factor.contiguous() for factor in factors], removed.contiguous()
    sums = [grad.contiguous() for grad in grads]
    value = removed.new_empty((), dtype=torch.float32)
    with torch.cuda.device_of(removed):
        walk = _walk(held, sums, plan)
        norms, parts = _group_norms(walk, plan, removed, eps)
        kernels.total_kernel[(1,)](parts, value, parts.numel(), BLOCK=1024)
        _scale(walk, plan, removed, norms, weight.float(), add=True)
    _written(grads, sums)
    return value


@torch.no_grad()
def group_prox_(factors: Sequence[Tensor], plan: GroupPlan, removed: Tensor, threshold: Tensor) -> None:
    """As `reference.group_prox_`; kept rows are neither read nor written, kept columns are written as they are.

    threshold: floating [n_groups].
    """
    held, removed = [factor.contiguous() for factor in factors], removed.contiguous()
    with torch.cuda.device_of(removed):
        walk = _walk(held, held, plan)
        norms, _ = _group_norms(walk, plan, removed, eps=0.0)
        _scale(walk, plan, removed, norms, threshold.float().contiguous(), prox=True)
    _written(factors, held)


def _written(tensors: Sequence[Tensor], copies: Sequence[Tensor]) -> None:
    """Bring what a kernel wrote to contiguous copies back to the tensors that were not contiguous themselves."""
    for tensor, copy in zip(tensors, copies, strict=True):
        if tensor is not copy:
            tensor.copy_(copy)
    # The kernel writes behind autograd's back: tell it, so that a stale saved tensor raises instead of lying.
    torch.autograd.graph.increment_version(tensors)


def _group_norms(walk: _Walk, plan: GroupPlan, removed: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """sqrt(sum of squares + eps) of every group, float32, and the sums over removed groups of every program."""
    table, grid, tile = walk
    slots, n_groups = plan._index.numel(), plan.n_groups
    config = tiles.group_norms_config(slots, n_groups)
    programs = triton.cdiv(n_groups, config.block_wide)
    squares = removed.new_empty(slots, dtype=torch.float32)
    norms = removed.new_empty(n_groups, dtype=torch.float32)
    parts = removed.new_empty(programs, dtype=torch.float64)
    kernels.slot_squares_kernel[grid](table, squares, **tile)
    kernels.group_norms_kernel[(programs,)](
        squares, plan._order, plan._starts, removed.view(torch.uint8), norms, parts, n_groups, eps,
        BLOCK_G=config.block_wide, BLOCK_S=config.block_long, num_warps=config.num_warps,
    )  # fmt: skip
    return norms, parts


def _scale(
    walk: _Walk, plan: GroupPlan, removed: Tensor, norms: Tensor, by: Tensor, *, prox: bool = False, add: bool = False
) -> None:
    table, grid, tile = walk
    kernels.scale_kernel[grid](table, plan._index, removed.view(torch.uint8), norms, by, PROX=prox, ADD=add, **tile)


def _walk(factors: list[Tensor], results: list[Tensor], plan: GroupPlan) -> _Walk:
    lines, first_slot = [], 0
    for factor, result, axis in zip(factors, results, plan.axes, strict=True):
        slots, length = factor.shape[axis], factor.shape[1 - axis]
        kind = 2 * _DTYPES.index(factor.dtype) + axis
        lines.append((factor.data_ptr(), result.data_ptr(), slots, length, first_slot, kind))
        first_slot += slots
    cuda = factors[0].is_cuda
    table = torch.tensor(lines, dtype=torch.int64, pin_memory=cuda).to(factors[0].device, non_blocking=True)
    config = tiles.slot_config(max(length for _, _, _, length, _, _ in lines))
    grid = len(lines), triton.cdiv(max(slots for _, _, slots, *_ in lines), config.block_wide)
    aligned = all(
        line[0] % 16 == 0 and line[1] % 16 == 0 and factor.shape[1] % 8 == 0
        for line, factor in zip(lines, factors, strict=True)
    )
    tile = {"BLOCK_S": config.block_wide, "BLOCK_L": config.block_long, "num_warps": config.num_warps}
    return table, grid, {"ALIGNED": aligned, **tile}
