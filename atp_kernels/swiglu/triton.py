"""The gated activation in Triton, forward and backward in one pass each, with the mask of its channels.

Both kernels walk a matrix in tiles of rows and columns. The gradient of the mask needs sums over rows: each of a fixed
number of programs per column block adds up its own rows and a second stage adds up the programs, without atomics.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from atp_kernels import triton_runtime
from atp_kernels.call import Call

_TILE = 2048  # elements per program at a time: 16 per thread, in accesses of 16 bytes
_WIDEST_BLOCK = 256
_PROGRAMS = 528  # four for each multiprocessor of an H100; a constant, so that sums do not depend on the device

# What the kernels call GELU, and the |gate| from which either activation is, in float32, what it is at infinity.
ACTIVATIONS = {"silu": (False, 120.0), "gelu_tanh": (True, 12.0)}


def supports(call: Call) -> str | None:
    """float32, float16 and bfloat16 on CUDA or in the interpreter."""
    return triton_runtime.refuses(call)


def gated(activation: str, gate: Tensor, up: Tensor, mask: Tensor | None = None) -> Tensor:
    """act(m * gate) * (m * up) [M, N] of two matrices, whose rows may lie apart, rounded once to their dtype.

    activation: "silu" or "gelu_tanh". mask [N], bool or floating: where it is 0 the result is exactly 0, whatever gate
    and up hold.
    """
    gate, up, (rows, width) = _unit_stride(gate), _unit_stride(up), gate.shape
    h = gate.new_empty(rows, width)
    if h.numel():
        block_m, block_n = tile_for(width)
        with torch.cuda.device_of(gate):
            gated_kernel[(triton.cdiv(rows, block_m) * triton.cdiv(width, block_n),)](
                gate, up, _vector(mask), h, rows, width, gate.stride(0), up.stride(0),
                **constants(activation), BLOCK_M=block_m, BLOCK_N=block_n, enable_fp_fusion=True,
            )  # fmt: skip
    return h


def gated_backward(
    activation: str,
    d_h: Tensor,
    gate: Tensor,
    up: Tensor,
    d_gate: Tensor,
    d_up: Tensor,
    mask: Tensor | None = None,
    need_mask: bool = False,
    sums: Tensor | None = None,
) -> Tensor | None:
    """Write the gradients of `gated` to d_gate, which may be d_h, and d_up; return that of the mask if it is needed.

    All matrices are [M, N] of one dtype and may lie in memory in any way. The gradient of the mask [N] is float32: the
    column sums of d(m * gate) * gate + d(m * up) * up. sums [samples, N]: those of each sample's rows are added.
    """
    d_h, gate, up, (rows, width) = _unit_stride(d_h), _unit_stride(gate), _unit_stride(up), gate.shape
    written = [grad if grad.stride(1) == 1 else grad.new_empty(grad.shape) for grad in (d_gate, d_up)]
    block_m, block_n = tile_for(width)
    summed = need_mask or sums is not None
    samples = 1 if sums is None else max(1, len(sums))
    columns, row_tiles = triton.cdiv(width, block_n), triton.cdiv(rows // samples, block_m)
    # For each sample.
    programs = min(row_tiles, max(1, _PROGRAMS // max(1, columns * samples))) if summed else row_tiles
    parts = gate.new_empty(samples, programs, width, dtype=torch.float32) if summed else None
    if gate.numel():
        with torch.cuda.device_of(gate):
            gated_backward_kernel[(samples * programs * columns,)](
                d_h, gate, up, _vector(mask), *written, parts,
                rows // samples, width, programs, triton.cdiv(row_tiles, programs) * block_m,
                d_h.stride(0), gate.stride(0), up.stride(0), *(grad.stride(0) for grad in written),
                **constants(activation), BLOCK_M=block_m, BLOCK_N=block_n, enable_fp_fusion=True,
            )  # fmt: skip
    for grad, copy in zip((d_gate, d_up), written, strict=True):
        if grad is not copy:
            grad.copy_(copy)
    if sums is not None and parts is not None:
        sums += parts.sum(1)
    return parts.sum((0, 1)) if need_mask and parts is not None else None


def tile_for(width: int) -> tuple[int, int]:
    """Rows and columns of a tile."""
    block_n = min(_WIDEST_BLOCK, triton.next_power_of_2(max(1, width)))
    return _TILE // block_n, block_n


def constants(activation: str) -> dict[str, object]:
    """What the kernels are compiled with for an activation."""
    gelu, saturated = ACTIVATIONS[activation]
    return {"GELU": gelu, "SATURATED": saturated}


def _unit_stride(matrix: Tensor) -> Tensor:
    """The matrix with its rows in one piece each, which may lie anywhere; a copy where they do not."""
    return matrix if matrix.stride(1) == 1 else matrix.contiguous()


def _vector(mask: Tensor | None) -> Tensor | None:
    """The mask in one piece, as the kernels read it."""
    if mask is None:
        return None
    return (mask.view(torch.uint8) if mask.dtype == torch.bool else mask).contiguous()


@triton.jit
def _activation(x, GELU: tl.constexpr, SATURATED: tl.constexpr):
    """(act(x), act'(x)) of x sigmoid(z): SiLU with z = x, GELU's tanh form with z = 2 sqrt(2 / pi) (x + 0.044715 x^3).

    Only exp(-|z|) is taken, so nothing overflows and 1 - sigmoid does not cancel; x is cut off where that is 0 already,
    so that an infinite x never meets a factor of 0. NaN passes every comparison as False and stays.
    """
    cut = tl.where(x < -SATURATED, -SATURATED, x)
    inner = tl.where(cut > SATURATED, SATURATED, cut)
    if GELU:
        z = 1.5957691216057308 * inner * (1.0 + 0.044715 * inner * inner)
        z_slope = 1.5957691216057308 * (1.0 + 0.134145 * inner * inner)
    else:
        z = inner
        z_slope = 1.0
    power = tl.exp(-tl.abs(z))
    inverse = 1.0 / (1.0 + power)
    sigmoid = tl.where(z < 0, power, 1.0) * inverse
    rest = tl.where(z < 0, 1.0, power) * inverse
    return cut * sigmoid, sigmoid * (1.0 + inner * z_slope * rest)


@triton.jit
def _masked(values, mask):
    return tl.where(mask == 0, 0.0, values * mask)


@triton.jit(do_not_specialize=["M"])
def gated_kernel(
    gate_ptr, up_ptr, mask_ptr, h_ptr, M, N, stride_gm, stride_um,
    GELU: tl.constexpr, SATURATED: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """h [M, N] = act(m * gate) * (m * up), contiguous; one tile per program, neighbours along a row first."""
    blocks = tl.cdiv(N, BLOCK_N)
    rows = (tl.program_id(0) // blocks).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    cols = tl.program_id(0) % blocks * BLOCK_N + tl.arange(0, BLOCK_N)
    ok = (rows < M)[:, None] & (cols < N)[None, :]
    gate = tl.load(gate_ptr + rows[:, None] * stride_gm + cols[None, :], mask=ok, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + rows[:, None] * stride_um + cols[None, :], mask=ok, other=0.0).to(tl.float32)
    if mask_ptr is not None:
        mask = tl.load(mask_ptr + cols, mask=cols < N, other=0).to(tl.float32)[None, :]
        gate = _masked(gate, mask)
        up = _masked(up, mask)
    value, _ = _activation(gate, GELU, SATURATED)
    tl.store(h_ptr + rows[:, None] * N + cols[None, :], (value * up).to(h_ptr.dtype.element_ty), mask=ok)


@triton.jit(do_not_specialize=["M", "programs", "rows_per_program"])
def gated_backward_kernel(
    d_h_ptr, gate_ptr, up_ptr, mask_ptr, d_gate_ptr, d_up_ptr, part_ptr,
    M, N, programs, rows_per_program, stride_hm, stride_gm, stride_um, stride_dgm, stride_dum,
    GELU: tl.constexpr, SATURATED: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """d_gate = m * d_h * m * up * act'(m * gate) and d_up = m * d_h * act(m * gate).

    M rows of each sample, whose programs follow those of the sample before. d_gate may lie where d_h does: an element
    is read before it is written. part [samples * programs, N], if there is one: the sums of the mask's gradient over
    the rows of each program.
    """
    blocks = tl.cdiv(N, BLOCK_N)
    pid = tl.program_id(0) // blocks
    cols = tl.program_id(0) % blocks * BLOCK_N + tl.arange(0, BLOCK_N)
    col_ok = cols < N
    if mask_ptr is not None:
        mask = tl.load(mask_ptr + cols, mask=col_ok, other=0).to(tl.float32)[None, :]
    sums = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    beyond = (pid // programs + 1).to(tl.int64) * M
    first = beyond - M + (pid % programs).to(tl.int64) * rows_per_program
    last = min(first + rows_per_program, beyond)
    for start in range(first, last, BLOCK_M):
        rows = start + tl.arange(0, BLOCK_M).to(tl.int64)[:, None]
        ok = (rows < last) & col_ok[None, :]
        d_h = tl.load(d_h_ptr + rows * stride_hm + cols[None, :], mask=ok, other=0.0).to(tl.float32)
        gate = tl.load(gate_ptr + rows * stride_gm + cols[None, :], mask=ok, other=0.0).to(tl.float32)
        up = tl.load(up_ptr + rows * stride_um + cols[None, :], mask=ok, other=0.0).to(tl.float32)
        masked_gate = gate
        masked_up = up
        if mask_ptr is not None:
            masked_gate = _masked(gate, mask)
            masked_up = _masked(up, mask)
        value, slope = _activation(masked_gate, GELU, SATURATED)
        d_gate = d_h * masked_up * slope
        d_up = d_h * value
        if part_ptr is not None:
            sums += d_gate * gate + d_up * up
        if mask_ptr is not None:
            d_gate = _masked(d_gate, mask)
            d_up = _masked(d_up, mask)
        tl.store(d_gate_ptr + rows * stride_dgm + cols[None, :], d_gate.to(d_gate_ptr.dtype.element_ty), mask=ok)
        tl.store(d_up_ptr + rows * stride_dum + cols[None, :], d_up.to(d_up_ptr.dtype.element_ty), mask=ok)
    if part_ptr is not None:
        tl.store(part_ptr + pid * N + cols, tl.sum(sums, axis=0), mask=col_ok)
