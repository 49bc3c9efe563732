"""RMSNorm in Triton, alone or after an addition: a kernel each way, and one for the weight of very wide rows.

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
    return _forward(x, None, None, weight, eps, 1.0, dtype, tile)


def add_forward(
    x: Tensor,
    output: Tensor,
    weight: Tensor,
    eps: float,
    multiplier: float,
    dtype: torch.dtype,
    *,
    tile: Tile | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """As `aten.add_forward`, but that multiplier * output is not rounded by itself."""
    stream = x.new_empty(x.shape, dtype=torch.promote_types(x.dtype, output.dtype))
    return stream, *_forward(x, _unit_stride(output), stream, weight, eps, multiplier, dtype, tile)


def _forward(
    x: Tensor,
    output: Tensor | None,
    stream: Tensor | None,
    weight: Tensor,
    eps: float,
    multiplier: float,
    dtype: torch.dtype,
    tile: Tile | None,
) -> tuple[Tensor, Tensor]:
    """(y, scales) of x, or of what is written to `stream`: x + multiplier * output."""
    x, (rows, width) = _unit_stride(x), x.shape
    y, scales = x.new_empty(rows, width, dtype=dtype), x.new_empty(rows, dtype=torch.float32)
    tile = tile or tile_for(width)
    if rows:
        with torch.cuda.device_of(x):
            rms_norm_kernel[(triton.cdiv(rows, tile.block_m),)](
                x, output, weight.contiguous(), stream, y, scales, rows, width, eps, multiplier,
                x.stride(0), 0 if output is None else output.stride(0), **_constants(width, tile),
            )  # fmt: skip
    return y, scales


def backward(
    d_y: Tensor, x: Tensor, weight: Tensor, scales: Tensor, need_x: bool, need_weight: bool, *, tile: Tile | None = None
) -> tuple[Tensor | None, Tensor | None]:
    """As `aten.backward`; a `tile` takes the place of that of the table."""
    return _backward(_Upstream(d_y), x, weight, scales, need_x, need_weight, tile)


def add_backward(
    d_stream: Tensor | None,
    d_y: Tensor,
    stream: Tensor,
    weight: Tensor,
    scales: Tensor,
    need_sum: bool,
    output: torch.dtype | None,
    multiplier: float,
    need_weight: bool,
    *,
    tile: Tile | None = None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """As `aten.add_backward`, with d_sum and d_output rounded once."""
    d_output = None if output is None else stream.new_empty(stream.shape, dtype=output)
    given = _Upstream(d_y, None if d_stream is None else _unit_stride(d_stream), d_output, multiplier)
    d_sum, d_weight = _backward(given, stream, weight, scales, need_sum, need_weight, tile)
    return d_sum, d_output, d_weight


class _Upstream(NamedTuple):
    """What d_x is made of beside x; d_output takes multiplier * d_x."""

    d_y: Tensor
    d_stream: Tensor | None = None
    d_output: Tensor | None = None
    multiplier: float = 1.0


def _backward(
    given: _Upstream, x: Tensor, weight: Tensor, scales: Tensor, need_x: bool, need_weight: bool, tile: Tile | None
) -> tuple[Tensor | None, Tensor | None]:
    given, x, tile = given._replace(d_y=_unit_stride(given.d_y)), _unit_stride(x), tile or tile_for(x.shape[1])
    d_x = parts = None
    with torch.cuda.device_of(x):
        if need_x:
            d_x, parts = _backward_rows(given, x, weight, scales, need_weight and x.shape[1] <= tile.block_k, tile)
        if need_weight and parts is None:
            parts = _backward_columns(given.d_y, x, scales)
    return d_x, None if parts is None else parts.sum(0).to(weight.dtype)


def _backward_rows(
    given: _Upstream, x: Tensor, weight: Tensor, scales: Tensor, with_parts: bool, tile: Tile
) -> tuple[Tensor, Tensor | None]:
    """Return (d_x, the weight's gradient of each program's rows) from one read of d_y and x."""
    d_y, d_stream, d_output, multiplier = given
    (rows, width), programs = x.shape, triton.cdiv(x.shape[0], tile.block_m)
    d_x, parts = x.new_empty(rows, width), None
    if with_parts:
        programs = min(_PROGRAMS, programs)
        parts = x.new_empty(programs, width, dtype=torch.float32)
    if rows:
        rms_norm_backward_kernel[(programs,)](
            d_y, x, weight.contiguous(), scales, d_stream, d_x, d_output, parts,
            rows, width, _share(rows, programs, tile.block_m), multiplier,
            d_y.stride(0), x.stride(0), 0 if d_stream is None else d_stream.stride(0), **_constants(width, tile),
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
def _load_sum(x_rows, output_rows, stream_rows, row_ok, cols, K, multiplier):
    """x, or x + multiplier * output as the stream holds it."""
    x = _load(x_rows, row_ok, cols, K)
    if output_rows is not None:
        x += _load(output_rows, row_ok, cols, K) * multiplier
        x = x.to(stream_rows.dtype.element_ty).to(tl.float32)
    return x


@triton.jit
def _store_grad(d_x_rows, d_stream_rows, d_output_rows, row_ok, cols, K, multiplier, values):
    """values + d_stream, where there is one, to d_x, and that times multiplier to d_output."""
    if d_stream_rows is not None:
        values += _load(d_stream_rows, row_ok, cols, K)
    _store(d_x_rows, row_ok, cols, K, values)
    if d_output_rows is not None:
        _store(d_output_rows, row_ok, cols, K, values * multiplier)


@triton.jit
def _load_weight(weight_ptr, cols, K):
    return tl.load(weight_ptr + cols, mask=cols < K, other=0.0).to(tl.float32)[None, :]


@triton.jit(do_not_specialize=["M"])
def rms_norm_kernel(
    x_ptr, output_ptr, weight_ptr, stream_ptr, y_ptr, scale_ptr, M, K, eps, multiplier, stride_xm, stride_om,
    WHOLE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """scale [M] = 1 / sqrt(mean of x^2 + eps) and y [M, K] = weight * x * scale; BLOCK_M rows per program.

    With an output [M, K] x + multiplier * output takes the place of x, and stream [M, K] holds it.
    WHOLE says that K <= BLOCK_K, so that nothing is left to read a second time.
    """
    end = BLOCK_K if WHOLE else K
    rows = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    cols = tl.arange(0, BLOCK_K)
    row_ok = rows < M
    x_rows = x_ptr + rows * stride_xm
    y_rows = y_ptr + rows * K
    output_rows = None
    stream_rows = None
    if output_ptr is not None:
        output_rows = output_ptr + rows * stride_om
        stream_rows = stream_ptr + rows * K
    x = _load_sum(x_rows, output_rows, stream_rows, row_ok, cols, K, multiplier)
    if stream_ptr is not None:
        _store(stream_rows, row_ok, cols, K, x)
    squares = x * x
    for start in range(BLOCK_K, end, BLOCK_K):
        rest = _load_sum(x_rows, output_rows, stream_rows, row_ok, start + cols, K, multiplier)
        if stream_ptr is not None:
            _store(stream_rows, row_ok, start + cols, K, rest)
        squares += rest * rest
    scale = tl.div_rn(1.0, tl.sqrt_rn(tl.sum(squares, axis=1) / K + eps))
    tl.store(scale_ptr + rows, scale, mask=row_ok)
    scale = scale[:, None]
    _store(y_rows, row_ok, cols, K, x * scale * _load_weight(weight_ptr, cols, K))
    for start in range(BLOCK_K, end, BLOCK_K):
        # Added up again: what other threads of the program have stored may not be there yet.
        rest = _load_sum(x_rows, output_rows, stream_rows, row_ok, start + cols, K, multiplier) * scale
        _store(y_rows, row_ok, start + cols, K, rest * _load_weight(weight_ptr, start + cols, K))


@triton.jit(do_not_specialize=["M", "rows_per_program"])
def rms_norm_backward_kernel(
    d_y_ptr, x_ptr, weight_ptr, scale_ptr, d_stream_ptr, d_x_ptr, d_output_ptr, part_ptr,
    M, K, rows_per_program, multiplier, stride_dm, stride_xm, stride_sm,
    WHOLE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """d_x [M, K] = d_stream + scale * (g - x * scale^2 * mean of g * x) with g = weight * d_y.

    d_stream [M, K], if there is one, is added; d_output [M, K], if there is one, takes multiplier * d_x.
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
        d_stream_rows = None
        d_output_rows = None
        if d_stream_ptr is not None:
            d_stream_rows = d_stream_ptr + rows * stride_sm
        if d_output_ptr is not None:
            d_output_rows = d_output_ptr + rows * K
        scale = tl.load(scale_ptr + rows, mask=row_ok, other=0.0)
        x = _load(x_rows, row_ok, cols, K)
        d_y = _load(d_y_rows, row_ok, cols, K)
        products = d_y * weight * x
        for start in range(BLOCK_K, end, BLOCK_K):
            g = _load(d_y_rows, row_ok, start + cols, K) * _load_weight(weight_ptr, start + cols, K)
            products += g * _load(x_rows, row_ok, start + cols, K)
        pull = (tl.sum(products, axis=1) * scale / K * scale)[:, None]
        scale = scale[:, None]
        d_x = (d_y * weight - x * pull) * scale
        _store_grad(d_x_rows, d_stream_rows, d_output_rows, row_ok, cols, K, multiplier, d_x)
        for start in range(BLOCK_K, end, BLOCK_K):
            g = _load(d_y_rows, row_ok, start + cols, K) * _load_weight(weight_ptr, start + cols, K)
            rest = _load(x_rows, row_ok, start + cols, K)
            d_x = (g - rest * pull) * scale
            _store_grad(d_x_rows, d_stream_rows, d_output_rows, row_ok, start + cols, K, multiplier, d_x)
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
