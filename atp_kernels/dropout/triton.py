"""Dropout by position and seed in Triton: a kernel of its own, and the tile that kernels of other rooms call."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from atp_kernels import triton_runtime
from atp_kernels.call import Call
from atp_kernels.dropout.definition import PHILOX_ROUNDS, Dropout

BLOCK_M, BLOCK_K, NUM_WARPS = 16, 256, 4
"""The tile of `dropout_kernel`: four 16-byte loads of 16-bit data per thread."""

_ROUNDS = tl.constexpr(PHILOX_ROUNDS)


def supports(call: Call) -> str | None:
    """float32, float16 and bfloat16, on CUDA or in the interpreter."""
    return triton_runtime.refuses(call)


def dropped(values: Tensor, dropout: Dropout) -> Tensor:
    """`definition.dropped`, in one launch."""
    m, k = values.shape
    result = values.new_empty(m, k)
    if values.numel() > 0:
        with torch.cuda.device_of(values):
            dropout_kernel[(triton.cdiv(m, BLOCK_M), triton.cdiv(k, BLOCK_K))](
                values, result, m, k, *values.stride(),
                WIDE=triton_runtime.passes_int32(values, result),
                BLOCK_M=BLOCK_M, BLOCK_K=BLOCK_K, **drawn(dropout), num_warps=NUM_WARPS, enable_fp_fusion=True,
            )  # fmt: skip
    return result


def drawn(dropout: Dropout | None) -> dict[str, object]:
    """A dropout as kernels take it: a threshold of zero keeps every element, so they draw nothing."""
    seed = 0 if dropout is None else dropout.seed
    on_device = isinstance(seed, Tensor)
    return {
        "seed": 0 if on_device else seed,
        "seed_ptr": seed if on_device else None,
        "THRESHOLD": 0 if dropout is None else dropout.threshold,
        "SCALE": 1.0 if dropout is None else dropout.scale,
    }


@triton.jit
def seed_of(seed, seed_ptr):
    """The seed, which lies on the device where there is a pointer to it."""
    if seed_ptr is not None:
        seed = tl.load(seed_ptr)
    return seed


@triton.jit
def dropped_tile(values, rows, first_col, seed, THRESHOLD: tl.constexpr, SCALE: tl.constexpr):
    """A tile after dropout; its first column is a multiple of four, so that each Philox call serves four elements."""
    quads = first_col // 4 + tl.arange(0, values.shape[1] // 4)
    w0, w1, w2, w3 = tl.philox(seed, rows.to(tl.uint32)[:, None], quads[None, :], 0, 0, n_rounds=_ROUNDS)
    # Joined twice, the last axis counts the words as w0 w1 w2 w3.
    even = tl.join(w0 >= THRESHOLD, w2 >= THRESHOLD)
    odd = tl.join(w1 >= THRESHOLD, w3 >= THRESHOLD)
    keep = tl.reshape(tl.join(even, odd), values.shape)
    return tl.where(keep, values.to(tl.float32) * SCALE, 0.0).to(values.dtype)


@triton.jit(do_not_specialize=["seed"])
def dropout_kernel(
    x_ptr, y_ptr,
    M, K,
    stride_xm, stride_xk,
    seed: tl.int64, seed_ptr,
    WIDE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, THRESHOLD: tl.constexpr, SCALE: tl.constexpr,
):  # fmt: skip
    """y = D x, contiguous [M, K], for the calls whose products the vendor GEMM takes."""
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    first_col = tl.program_id(1) * BLOCK_K
    cols = first_col + tl.arange(0, BLOCK_K)
    ok = (rows < M)[:, None] & (cols < K)[None, :]
    if WIDE:
        rows = rows.to(tl.int64)
        cols = cols.to(tl.int64)
    x = tl.load(x_ptr + rows[:, None] * stride_xm + cols[None, :] * stride_xk, mask=ok, other=0.0)
    y = dropped_tile(x, rows, first_col, seed_of(seed, seed_ptr), THRESHOLD, SCALE)
    tl.store(y_ptr + rows[:, None] * K + cols[None, :], y, mask=ok)
