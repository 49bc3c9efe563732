"""Group lasso, its gradient and its proximal step in Triton: one to four kernels, whatever the number of factors.

The table of a call's factors is on the device. Its plan keeps the latest ones, and a call with the same factors in the
same places takes its own: the address of a factor whose storage has moved since can never be used. A CUDA graph, whose
replays could not copy from the host, captures calls whose table is there; the plan must live as long as the graph does.
"""

from collections.abc import Sequence

import torch
import triton
from torch import Tensor

from atp_kernels import checks, triton_runtime
from atp_kernels.call import Call
from atp_kernels.checks import check_written
from atp_kernels.groups import triton_kernels as kernels
from atp_kernels.groups.plan import GroupPlan

_Walk = tuple[Tensor, tuple[int, int], dict[str, int | bool]]
"""A table of factors, and the grid and the tile of a kernel over them."""

_TABLES = 8  # that a plan keeps besides those in graphs: the calls of a step, and a few places of new gradients
_PIECE = 64  # elements; each piece of an allocation begins at a multiple of it

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)  # in the order of a table's kinds


def slot_tile(length: int) -> tuple[int, int]:
    """Slots and entries of a tile, 2048 elements in all, for slots of at most this length."""
    entries = min(64, max(8, triton.next_power_of_2(max(1, length))))
    return 2048 // entries, entries


def group_tile(slots: int, groups: int) -> tuple[int, int]:
    """Groups and slots of a tile that adds up slots by group: about as long as a group is, 1024 slots in all."""
    owned = min(256, triton.next_power_of_2(max(1, triton.cdiv(slots, max(1, groups)))))
    return 1024 // owned, owned


def supports(call: Call) -> str | None:
    """float32, float16 and bfloat16, mixed in any way, on CUDA or in the interpreter."""
    return triton_runtime.refuses(call)


@torch.no_grad()
def group_lasso_forward(
    factors: Sequence[Tensor], plan: GroupPlan, removed: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """As `aten.group_lasso_forward`: float32 sums within a row or column, float64 within a group, norms in float32."""
    held, removed = [factor.contiguous() for factor in factors], removed.contiguous()
    value = removed.new_empty((), dtype=torch.float32)
    with torch.cuda.device_of(removed):
        norms, parts = _group_norms(_walk(held, held, plan), plan, removed, eps)
        kernels.total_kernel[(1,)](parts, value, parts.numel(), BLOCK=1024, enable_fp_fusion=True)
    return value, norms


@torch.no_grad()
def group_lasso_backward(
    factors: Sequence[Tensor], plan: GroupPlan, removed: Tensor, norms: Tensor, grad_out: Tensor
) -> list[Tensor]:
    """As `aten.group_lasso_backward`; the zeros of kept rows are written without reading them."""
    held, removed = [factor.contiguous() for factor in factors], removed.contiguous()
    sizes = [-(-factor.numel() // _PIECE) * _PIECE * factor.element_size() for factor in held]
    # Pieces of one allocation lie where the table says, whatever its address is.
    storage = removed.new_empty(sum(sizes), dtype=torch.uint8)
    grads, start = [], 0
    for factor, size in zip(held, sizes, strict=True):
        piece = factor.new_empty(0)
        piece.set_(storage.untyped_storage(), start // factor.element_size(), factor.shape, (factor.shape[1], 1))
        grads.append(piece)
        start += size
    with torch.cuda.device_of(removed):
        walk = _walk(held, grads, plan, storage.data_ptr())
        _scale(walk, plan, removed, norms.contiguous(), grad_out.float())
    return grads


@torch.no_grad()
def group_lasso_grad_(
    factors: Sequence[Tensor], grads: Sequence[Tensor], plan: GroupPlan, removed: Tensor, weight: Tensor, eps: float
) -> Tensor:
    """As `aten.group_lasso_grad_`, with each sum rounded once; gradients of kept rows are neither read nor written.

    Raises RuntimeError for a gradient that does not have the dtype of its factor.
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
        kernels.total_kernel[(1,)](parts, value, parts.numel(), BLOCK=1024, enable_fp_fusion=True)
        _scale(walk, plan, removed, norms, weight.float(), add=True)
    _written(grads, sums)
    return value


@torch.no_grad()
def group_prox_(factors: Sequence[Tensor], plan: GroupPlan, removed: Tensor, threshold: Tensor) -> None:
    """As `aten.group_prox_`; kept rows are neither read nor written, kept columns are written back as they are."""
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
    block_g, block_s = group_tile(slots, n_groups)
    programs = triton.cdiv(n_groups, block_g)
    squares = removed.new_empty(slots, dtype=torch.float32)
    norms = removed.new_empty(n_groups, dtype=torch.float32)
    parts = removed.new_empty(programs, dtype=torch.float64)
    kernels.slot_squares_kernel[grid](table, squares, **tile, enable_fp_fusion=True)
    kernels.group_norms_kernel[(programs,)](
        squares, plan._order, plan._starts, removed.view(torch.uint8), norms, parts, n_groups, eps,
        BLOCK_G=block_g, BLOCK_S=block_s, enable_fp_fusion=True,
    )  # fmt: skip
    return norms, parts


def _scale(
    walk: _Walk, plan: GroupPlan, removed: Tensor, norms: Tensor, by: Tensor, *, prox: bool = False, add: bool = False
) -> None:
    table, grid, tile = walk
    kernels.scale_kernel[grid](
        table, plan._index, removed.view(torch.uint8), norms, by, PROX=prox, ADD=add, **tile, enable_fp_fusion=True
    )


def _walk(factors: list[Tensor], results: list[Tensor], plan: GroupPlan, base: int = 0) -> _Walk:
    """base: an address that changes from call to call, by which results are counted."""
    lines: list[tuple[int, ...]] = []
    first_slot = 0
    for factor, result, axis in zip(factors, results, plan.axes, strict=True):
        slots, length = factor.shape[axis], factor.shape[1 - axis]
        kind = 2 * _DTYPES.index(factor.dtype) + axis
        place = result.data_ptr() - base if result.numel() else 0  # what is empty has no address
        lines.append((factor.data_ptr(), place, slots, length, first_slot, kind))
        first_slot += slots
    table = _table(tuple(lines), plan)
    if base:
        table = table.clone()
        table[:, 1] += base
    block_s, block_l = slot_tile(max(length for _, _, _, length, _, _ in lines))
    grid = triton.cdiv(max(slots for _, _, slots, *_ in lines), block_s), len(lines)
    aligned = all(
        line[0] % 16 == 0 and (line[1] + base) % 16 == 0 and factor.shape[1] % 8 == 0
        for line, factor in zip(lines, factors, strict=True)
    )
    return table, grid, {"ALIGNED": aligned, "BLOCK_S": block_s, "BLOCK_L": block_l}


def _table(lines: tuple[tuple[int, ...], ...], plan: GroupPlan) -> Tensor:
    """The lines on the device, int64 [factors, FIELDS], copied there from pinned memory unless the plan has them.

    Only the stream on which a table was copied knows that it is complete. A capture begins after the device was waited
    for, takes the table of any stream, and has it kept for good.
    """
    tables, on_gpu = plan._tables, plan.device.type == "cuda"
    if checks.is_capturing(plan.device):
        for key, table in list(tables.items()):
            if key[-1] == lines:
                return tables.setdefault(("captured", lines), table)
        checks.refuse_capture(
            plan.device, "a group operation whose table of factors would have to be copied from the host",
            "call it once before with the same GroupPlan, factors and gradients, all contiguous",
        )  # fmt: skip
    key = torch.cuda.current_stream(plan.device).cuda_stream if on_gpu else 0, lines
    kept = tables.pop(key) if key in tables else None
    if kept is None:
        kept = torch.tensor(lines, dtype=torch.int64, pin_memory=on_gpu).to(plan.device, non_blocking=True)
        for oldest in [key for key in tables if key[0] != "captured"][: 1 - _TABLES]:
            del tables[oldest]
    tables[key] = kept
    return kept
