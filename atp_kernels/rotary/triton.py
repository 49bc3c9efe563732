"""Rotary position embedding in Triton: queries and keys in one launch each way, with the transposition of their heads.

A program takes some tokens of one sample and keeps their cosines and sines in registers, while it rotates one head
after the other. Backward is the same kernel with the inverse rotation, which reads the gradients where they lie and
writes them in the order in which the linears before it want them.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from atp_kernels import triton_runtime
from atp_kernels.call import Call

_ELEMENTS = 1024  # of a half of the heads that a program rotates at a time: 8 per thread
_HEADS = 8  # that share a program's cosines and sines


def supports(call: Call) -> str | None:
    """float32, float16 and bfloat16 on CUDA."""
    return triton_runtime.refuses(call)


def forward(heads: list[Tensor], cos: Tensor, sin: Tensor, index: Tensor | None, width: int) -> list[Tensor]:
    """As `aten.forward`, each result in one piece."""
    results = [x.new_empty(x.shape[0], x.shape[2], x.shape[1], width) for x in heads]
    places = [result.transpose(1, 2) for result in results]
    _rotate(heads, places, cos, sin, index, heads[0].shape[-1], inverse=False)
    return results


def backward(grads: list[Tensor], cos: Tensor, sin: Tensor, index: Tensor | None, size: int) -> list[Tensor]:
    """As `aten.backward`, each result in one piece."""
    sources = [grad.transpose(1, 2) for grad in grads]
    results = [source.new_empty(*source.shape[:3], size) for source in sources]
    _rotate(sources, results, cos, sin, index, size, inverse=True)
    return results


def tile_for(half: int) -> tuple[int, int]:
    """(tokens, dimensions of a half) that a program holds at a time."""
    block_d = triton.next_power_of_2(max(1, half))
    return max(1, _ELEMENTS // block_d), block_d


def _rotate(
    sources: list[Tensor], targets: list[Tensor], cos: Tensor, sin: Tensor, index: Tensor | None, size: int,
    *, inverse: bool,
) -> None:  # fmt: skip
    """Write the first `size` dimensions of [batch, tokens, heads, D] rotated, and zeros behind them."""
    # The one of a pair alone takes the place of the other, which then has no heads.
    (first, second), (to_first, to_second) = (pair if len(pair) == 2 else pair * 2 for pair in (sources, targets))
    first, second = _unit_stride(first), _unit_stride(second)
    cos, sin = (_unit_stride(angles.expand(first.shape[0], -1, -1)) for angles in (cos, sin))
    (batch, tokens, heads, _), others = first.shape, second.shape[2] if len(sources) == 2 else 0
    beyond = targets[0].shape[-1] - size
    block_t, block_d = tile_for(size // 2)
    blocks = triton.cdiv(tokens, block_t)
    grid = batch * blocks, triton.cdiv(heads + others, _HEADS)
    if 0 in grid or (size == 0 and beyond == 0):
        return
    with torch.cuda.device_of(first):
        rotary_kernel[grid](
            first, second, to_first, to_second, cos, sin, None if index is None else index.contiguous(),
            blocks, tokens, heads, heads + others, size // 2, beyond,
            *first.stride()[:3], *second.stride()[:3], *to_first.stride()[:3], *to_second.stride()[:3],
            *cos.stride()[:2], *sin.stride()[:2],
            INVERSE=inverse, HEADS=_HEADS, BLOCK_T=block_t, BLOCK_D=block_d,
            BLOCK_ZERO=triton.next_power_of_2(beyond) if beyond else 0, num_warps=4, enable_fp_fusion=True,
        )  # fmt: skip


def _unit_stride(tensor: Tensor) -> Tensor:
    return tensor if tensor.stride(-1) == 1 or tensor.shape[-1] == 0 else tensor.contiguous()


@triton.jit(do_not_specialize=["blocks", "tokens", "heads", "all_heads", "beyond"])
def rotary_kernel(
    q_ptr, k_ptr, q_out_ptr, k_out_ptr, cos_ptr, sin_ptr, index_ptr,
    blocks, tokens, heads, all_heads, half, beyond,
    q_b, q_t, q_h, k_b, k_t, k_h, qo_b, qo_t, qo_h, ko_b, ko_t, ko_h, cos_b, cos_t, sin_b, sin_t,
    INVERSE: tl.constexpr, HEADS: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_ZERO: tl.constexpr,
):  # fmt: skip
    """Rotate heads of q, then of k; a grid of blocks of every sample's tokens x groups of heads."""
    b = (tl.program_id(0) // blocks).to(tl.int64)
    t = (tl.program_id(0) % blocks).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    d = tl.arange(0, BLOCK_D)
    t_ok = t < tokens
    ok = t_ok[:, None] & (d < half)[None, :]
    if index_ptr is None:
        at1, at2 = d, half + d
    else:
        at1 = tl.load(index_ptr + d, mask=d < half, other=0)
        at2 = tl.load(index_ptr + half + d, mask=d < half, other=0)
    cos_rows, sin_rows = cos_ptr + b * cos_b + (t * cos_t)[:, None], sin_ptr + b * sin_b + (t * sin_t)[:, None]
    cos1 = tl.load(cos_rows + at1[None, :], mask=ok, other=0.0).to(tl.float32)
    cos2 = tl.load(cos_rows + at2[None, :], mask=ok, other=0.0).to(tl.float32)
    sin1 = tl.load(sin_rows + at1[None, :], mask=ok, other=0.0).to(tl.float32)
    sin2 = tl.load(sin_rows + at2[None, :], mask=ok, other=0.0).to(tl.float32)
    if INVERSE:
        sin1, sin2 = -sin2, -sin1
    first = tl.program_id(1).to(tl.int64) * HEADS
    for i in range(HEADS):
        h = first + i
        if h < all_heads:
            if h < heads:
                source = q_ptr + b * q_b + h * q_h + (t * q_t)[:, None]
                target = q_out_ptr + b * qo_b + h * qo_h + (t * qo_t)[:, None]
            else:
                source = k_ptr + b * k_b + (h - heads) * k_h + (t * k_t)[:, None]
                target = k_out_ptr + b * ko_b + (h - heads) * ko_h + (t * ko_t)[:, None]
            x1 = tl.load(source + d[None, :], mask=ok, other=0.0).to(tl.float32)
            x2 = tl.load(source + (half + d)[None, :], mask=ok, other=0.0).to(tl.float32)
            kind = q_out_ptr.dtype.element_ty
            tl.store(target + d[None, :], (x1 * cos1 - x2 * sin1).to(kind), mask=ok)
            tl.store(target + (half + d)[None, :], (x2 * cos2 + x1 * sin2).to(kind), mask=ok)
            if BLOCK_ZERO > 0:
                z = tl.arange(0, BLOCK_ZERO)
                beyond_ok = t_ok[:, None] & (z < beyond)[None, :]
                tl.store(target + (2 * half + z)[None, :], tl.zeros((BLOCK_T, BLOCK_ZERO), dtype=kind), mask=beyond_ok)
