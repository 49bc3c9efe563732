"""RMSNorm in Triton: one kernel forward, one backward, and one for the weight's gradient over very wide rows.

A program takes whole rows: several narrow ones at a time, or a wide one whose first `BLOCK_K` elements stay in
registers while the rest is read a second time. Sums are in float32. The gradient of the weight needs sums over rows:
each of a fixed number of programs adds up its own rows, and a second stage adds up the programs, so no atomics are
needed and the result is the same in every run and on every GPU.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from atp_kernels import triton_runtime
from atp_kernels.call import Call, shown

_WIDEST_BLOCK = 8192
_SMALLEST_TILE = 2048
_PROGRAMS = 264  # two for each multiprocessor of an H100; a constant, so that sums do not depend on the device
_COLUMN_TILE = (32, 64)  # rows and columns of `weight_grad_kernel`


class Tile(NamedTuple):
    """The rows and columns that a program holds at a time, and the warps that share them."""

    block_m: int
    block_k: int
    num_warps: int


def tile_for(width: int) -> Tile:
    """The tile for rows of `width` elements: 16 elements per thread, at least one 16-byte access in every dtype."""
    block_k = min(_WIDEST_BLOCK, triton.next_power_of_2(width))
    block_m = max(1, _SMALLEST_TILE // block_k)
    return Tile(block_m, block_k, block_m * block_k // 512)


def supports(call: Call) -> str | None:
    """float32, float16 and bfloat16 on CUDA, rounded to any of them."""
    if call.result is not None and call.result not in triton_runtime.DTYPES:
        return f"the triton backend rounds to float32, float16 or bfloat16, not to {shown(call.result)}"
    return triton_runtime.refuses(call)


def forward(
    x: Tensor, weight: Tensor, eps: float, dtype: torch.dtype, *, tile: Tile | None = None
) -> tuple[Tensor, Tensor]:
    """As `aten.forward`; a `tile` takes the place of that of the table."""
    x, (rows, width) = _unit_stride(x), x.shape
    y, scales = x.new_empty(rows, width, dtype=dtype), x.new_empty(rows, dtype=torch.float32)
    tile = tile or tile_for(width)
    if rows:
        with torch.cuda.device_of(x):
            rms_norm_kernel[(triton.cdiv(rows, tile.block_m),)](
                x, weight.contiguous(), y, scales, rows, width, eps, x.stride(0), **_constants(width, tile)
            )
    return y, scales


def backward(
    d_y: Tensor, x: Tensor, weight: Tensor, scales: Tensor, need_x: bool, need_weight: bool, *, tile: Tile | None = None
) -> tuple[Tensor | None, Tensor | None]:
    """As `aten.backward`; a `tile` takes the place of that of the table."""
    d_y, x, tile = _unit_stride(d_y), _unit_stride(x), tile or tile_for(x.shape[1])
    d_x = parts = None
    with torch.cuda.device_of(x):
        if need_x:
            d_x, parts = _backward_rows(d_y, x, weight, scales, need_weight and x.shape[1] <= tile.block_k, tile)
        if need_weight and parts is None:
            parts = _backward_columns(d_y, x, scales)
    return d_x, None if parts is None else parts.sum(0).to(weight.dtype)


def _backward_rows(
    d_y: Tensor, x: Tensor, weight: Tensor, scales: Tensor, with_parts: bool, tile: Tile
) -> tuple[Tensor, Tensor | None]:
    """Return (d_x, the weight's gradient of each program's rows) from one read of d_y and x."""
    (rows, width), programs = x.shape, triton.cdiv(x.shape[0], tile.block_m)
    d_x, parts = x.new_empty(rows, width), None
    if with_parts:
        programs = min(_PROGRAMS, programs)
        parts = x.new_empty(programs, width, dtype=torch.float32)
    if rows:
        rms_norm_backward_kernel[(programs,)](
            d_y, x, weight.contiguous(), scales, d_x, parts, rows, width, _share(rows, programs, tile.block_m),
            d_y.stride(0), x.stride(0), **_constants(width, tile),
        )  # fmt: skip
    return d_x, parts


def _backward_columns(d_y: Tensor, x: Tensor, scales: Tensor) -> Tensor:
    """The weight's gradient of each program's rows, where d_x is not asked for or its rows are too wide."""
    (rows, width), (block_m, block_k) = x.shape, _COLUMN_TILE
    columns = triton.cdiv(width, block_k)
    splits = min(triton.cdiv(rows, block_m), max(1, _PROGRAMS // columns))
    parts = x.new_empty(splits, width, dtype=torch.float32)
    if rows:
        weight_grad_kernel[(columns, splits)](
            d_y, x, scales, parts, rows, width, _share(rows, splits, block_m), d_y.stride(0), x.stride(0),
            BLOCK_M=block_m, BLOCK_K=block_k, num_warps=4, enable_fp_fusion=True,
        )  # fmt: skip
    return parts


def _share(rows: int, programs: int, block_m: int) -> int:
    """How many rows each program takes: whole tiles, so that the last programs may have none."""
    return triton.cdiv(triton.cdiv(rows, programs), block_m) * block_m


def _constants(width: int, tile: Tile) -> dict[str, object]:
    sizes: dict[str, object] = {"WHOLE": width <= tile.block_k, "BLOCK_M": tile.block_m, "BLOCK_K": tile.block_k}
    return sizes | {"num_warps": tile.num_warps, "enable_fp_fusion": True}


def _unit_stride(matrix: Tensor) -> Tensor:
    """A matrix whose rows are in one piece each, wherever they lie: a copy where those of the given one are not."""
    return matrix if matrix.stride(1) == 1 else matrix.contiguous()


@triton.jit
def _load(row_ptrs, row_ok, cols, K):
    ok = row_ok[:, None] & (cols < K)[None, :]
    return tl.load(row_ptrs[:, None] + cols[None, :], mask=ok, other=0.0).to(tl.float32)


@triton.jit
def _store(row_ptrs, row_ok, cols, K, values):
    ok = row_ok[:, None] & (cols < K)[None, :]
    tl.store(row_ptrs[:, None] + cols[None, :], values.to(row_ptrs.dtype.element_ty), mask=ok)


@triton.jit
def _load_weight(weight_ptr, cols, K):
    return tl.load(weight_ptr + cols, mask=cols < K, other=0.0).to(tl.float32)[None, :]


@triton.jit(do_not_specialize=["M"])
def rms_norm_kernel(
    x_ptr, weight_ptr, y_ptr, scale_ptr, M, K, eps, stride_xm,
    WHOLE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """scale [M] = 1 / sqrt(mean of x^2 + eps) and y [M, K] = weight * x * scale; BLOCK_M rows per program.

    WHOLE says that K <= BLOCK_K, so that nothing is left to read a second time.
    """
    end = BLOCK_K if WHOLE else K
    rows = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    cols = tl.arange(0, BLOCK_K)
    row_ok = rows < M
    x_rows = x_ptr + rows * stride_xm
    y_rows = y_ptr + rows * K
    x = _load(x_rows, row_ok, cols, K)
    squares = x * x
    for start in range(BLOCK_K, end, BLOCK_K):
        rest = _load(x_rows, row_ok, start + cols, K)
        squares += rest * rest
    scale = tl.div_rn(1.0, tl.sqrt_rn(tl.sum(squares, axis=1) / K + eps))
    tl.store(scale_ptr + rows, scale, mask=row_ok)
    scale = scale[:, None]
    _store(y_rows, row_ok, cols, K, x * scale * _load_weight(weight_ptr, cols, K))
    for start in range(BLOCK_K, end, BLOCK_K):
        rest = _load(x_rows, row_ok, start + cols, K) * scale
        _store(y_rows, row_ok, start + cols, K, rest * _load_weight(weight_ptr, start + cols, K))


@triton.jit(do_not_specialize=["M", "rows_per_program"])
def rms_norm_backward_kernel(
    d_y_ptr, x_ptr, weight_ptr, scale_ptr, d_x_ptr, part_ptr,
    M, K, rows_per_program, stride_dm, stride_xm,
    WHOLE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """d_x [M, K] = scale * (g - x * scale^2 * mean of g * x) with g = weight * d_y.

    part [programs, K], if there is one, which takes WHOLE rows: sums of d_y * x * scale over the rows of each program.
    """
    end = BLOCK_K if WHOLE else K
    cols = tl.arange(0, BLOCK_K)
    first = tl.program_id(0).to(tl.int64) * rows_per_program
    last = min(first + rows_per_program, M)
    weight = _load_weight(weight_ptr, cols, K)
    sums = tl.zeros((BLOCK_M, BLOCK_K), dtype=tl.float32)
    for start_row in range(first, last, BLOCK_M):
        rows = start_row + tl.arange(0, BLOCK_M).to(tl.int64)
        row_ok = rows < last
        x_rows = x_ptr + rows * stride_xm
        d_y_rows = d_y_ptr + rows * stride_dm
        d_x_rows = d_x_ptr + rows * K
        scale = tl.load(scale_ptr + rows, mask=row_ok, other=0.0)
        x = _load(x_rows, row_ok, cols, K)
        d_y = _load(d_y_rows, row_ok, cols, K)
        products = d_y * weight * x
        for start in range(BLOCK_K, end, BLOCK_K):
            g = _load(d_y_rows, row_ok, start + cols, K) * _load_weight(weight_ptr, start + cols, K)
            products += g * _load(x_rows, row_ok, start + cols, K)
        pull = (tl.sum(products, axis=1) * scale / K * scale)[:, None]
        scale = scale[:, None]
        _store(d_x_rows, row_ok, cols, K, (d_y * weight - x * pull) * scale)
        for start in range(BLOCK_K, end, BLOCK_K):
            g = _load(d_y_rows, row_ok, start + cols, K) * _load_weight(weight_ptr, start + cols, K)
            rest = _load(x_rows, row_ok, start + cols, K)
            _store(d_x_rows, row_ok, start + cols, K, (g - rest * pull) * scale)
        if part_ptr is not None:
            sums += d_y * (x * scale)
    if part_ptr is not None:
        tl.store(part_ptr + tl.program_id(0) * K + cols, tl.sum(sums, axis=0), mask=cols < K)


@triton.jit(do_not_specialize=["M", "rows_per_program"])
def weight_grad_kernel(
    d_y_ptr, x_ptr, scale_ptr, part_ptr,
    M, K, rows_per_program, stride_dm, stride_xm,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """part [splits, K] = the sums of d_y * x * scale over the rows of each split; a grid of columns x splits."""
    cols = tl.program_id(0).to(tl.int64) * BLOCK_K + tl.arange(0, BLOCK_K)
    first = tl.program_id(1).to(tl.int64) * rows_per_program
    last = min(first + rows_per_program, M)
    sums = tl.zeros((BLOCK_M, BLOCK_K), dtype=tl.float32)
    for start_row in range(first, last, BLOCK_M):
        rows = start_row + tl.arange(0, BLOCK_M).to(tl.int64)
        row_ok = rows < last
        scale = tl.load(scale_ptr + rows, mask=row_ok, other=0.0)[:, None]
        x = _load(x_ptr + rows * stride_xm, row_ok, cols, K)
        sums += _load(d_y_ptr + rows * stride_dm, row_ok, cols, K) * (x * scale)
    tl.store(part_ptr + tl.program_id(1) * K + cols, tl.sum(sums, axis=0), mask=cols < K)
