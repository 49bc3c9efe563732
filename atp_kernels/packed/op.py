"""Autograd Functions over packed linears: linears of one input, and a gated MLP. They save what others do."""

from collections.abc import Sequence

import torch
from torch import Tensor

from atp_kernels.call import differentiable_once, matrix, unflattened
from atp_kernels.extension import ops
from atp_kernels.packed import PackedLinears
from atp_kernels.projection import Projection

Norm = tuple[Tensor, float]
"""The frozen float32 weight [in] of an RMSNorm, and its eps."""


def packed_linears(x: Tensor, packed: PackedLinears, linears: Sequence[Projection]) -> Tensor:
    """y of all linears side by side, bfloat16 [..., rows of all], for x [..., in] in any floating dtype."""
    result: Tensor = PackedFunction.apply(packed, x.to(torch.bfloat16), *_factors(linears))
    return result


def packed_mlp(
    x: Tensor,
    first: PackedLinears,
    last: PackedLinears,
    linears: Sequence[Projection],
    mask_grad: Tensor | None = None,
    norm: Norm | None = None,
    gelu: bool = False,
) -> Tensor:
    """down(act(gate(x)) * up(x)), bfloat16 [..., out]: gate and up in `first`, down in `last`, all three in `linears`.

    act is SiLU, or GELU by its tanh. mask_grad as in `masked_lora_swiglu`. With a norm, x is float32 [..., in] and so
    is the result, x + mlp(norm(x)).
    """
    operands = x if norm is not None else x.to(torch.bfloat16), *_factors(linears)
    result: Tensor = PackedMlpFunction.apply(first, last, mask_grad, norm, gelu, *operands)
    return result


def packed_attention(
    x: Tensor,
    first: PackedLinears,
    last: PackedLinears,
    linears: Sequence[Projection],
    angles: tuple[Tensor, Tensor],
    mask: Tensor | None,
    scaling: float,
    mask_grads: Sequence[Tensor] | None = None,
    norm: Norm | None = None,
) -> Tensor:
    """Attention o(softmax(scaling Q K^T) V), bfloat16 [batch, tokens, out], for x [batch, tokens, in].

    q, k and v are in `first`, o in `last`, all four in `linears`. angles: cos and sin of RoPE [batch or 1, tokens, head
    width], by which queries and keys turn. mask: bool [batch or 1, 1, tokens, tokens], True for what a token sees, of
    which a token that sees nothing gets the mean of all; None is causal. mask_grads: of q, k and v, float32 [batch,
    rows], to which the gradients of masks of ones on their outputs are added in the backward pass. norm as in
    `packed_mlp`.
    """
    cos, sin = (part.float().reshape(-1, part.shape[-1]).contiguous() for part in angles)
    seen = None if mask is None else mask.squeeze(1).contiguous()
    operands = x if norm is not None else x.to(torch.bfloat16), *_factors(linears)
    result: Tensor = PackedAttentionFunction.apply(first, last, (cos, sin, seen, scaling), mask_grads, norm, *operands)
    return result


def _factors(linears: Sequence[Projection]) -> list[Tensor]:
    return [factor for p in linears for factor in (p.lora_a, p.lora_b)]


class PackedFunction(torch.autograd.Function):
    """(pack, x, then lora_a and lora_b of each linear) -> y."""

    @staticmethod
    def forward(ctx, pack, x, *factors):
        y, wide = ops.packed_forward(matrix(x).contiguous(), pack.weight, pack.down, pack.bias, factors, pack.scaling)
        ctx.pack, ctx.shape = pack, x.shape
        ctx.save_for_backward(wide, *factors)
        return unflattened(y, x.shape)

    @staticmethod
    @differentiable_once
    def backward(ctx, grad):
        pack, (wide, *factors), need_x = ctx.pack, ctx.saved_tensors, ctx.needs_input_grad[1]
        grad = matrix(grad).contiguous()
        d_x, *found = ops.packed_backward(grad, wide, pack.weight, pack.down, factors, pack.scaling, need_x)
        return None, d_x.view(ctx.shape) if need_x else None, *found


class PackedMlpFunction(torch.autograd.Function):
    """(packs, sums or None, norm or None, GELU or SiLU, x, the factors of gate, up and down) -> y.

    What down reads is made again.
    """

    @staticmethod
    def forward(ctx, first, last, sums, norm, gelu, x, *factors):
        packs = first.weight, first.down, first.bias, last.weight, last.down, last.bias
        rows, scalings = matrix(x).contiguous(), (first.scaling, last.scaling, gelu)
        y, *saved, scales = ops.packed_mlp_forward(rows, *packs, factors, *scalings, *(norm or ()))
        ctx.packs, ctx.sums, ctx.shape, ctx.gelu = (first, last), sums, x.shape, gelu
        ctx.save_for_backward(*saved, *factors, *(() if norm is None else (rows, norm[0], scales)))
        return unflattened(y, x.shape)

    @staticmethod
    @differentiable_once
    def backward(ctx, grad):
        (first, last), need_x = ctx.packs, ctx.needs_input_grad[5]
        wide, both, s, *factors = ctx.saved_tensors
        factors, around = factors[:6], factors[6:]
        packs = first.weight, first.down, last.weight, last.down
        grad, scalings = matrix(grad).contiguous(), (first.scaling, last.scaling, ctx.gelu)
        d_x, *found = ops.packed_mlp_backward(
            grad, wide, both, s, *packs, factors, *scalings, need_x, ctx.sums, *around
        )
        return *[None] * 5, d_x.view(ctx.shape) if need_x else None, *found


class PackedAttentionFunction(torch.autograd.Function):
    """(packs, (cos, sin, mask, scaling), sums or None, norm or None, x, the factors of q, k, v and o) -> y."""

    @staticmethod
    def forward(ctx, first, last, attends, sums, norm, x, *factors):
        packs = first.weight, first.down, first.bias, last.weight, last.down, last.bias
        rows, given = matrix(x).contiguous(), (first.scaling, last.scaling, *attends, len(x), *(norm or ()))
        y, *saved, scales = ops.packed_attention_forward(rows, *packs, factors, *given)
        ctx.packs, ctx.attends, ctx.sums, ctx.shape = (first, last), attends, sums, x.shape
        ctx.save_for_backward(*saved, *factors, *(() if norm is None else (rows, norm[0], scales)))
        return unflattened(y, x.shape)

    @staticmethod
    @differentiable_once
    def backward(ctx, grad):
        (first, last), need_x, (cos, sin, _, scaling) = ctx.packs, ctx.needs_input_grad[5], ctx.attends
        kept = ctx.saved_tensors  # asked for once: a second time is an error inside activation checkpointing
        saved, factors, around = kept[:4], kept[4:12], kept[12:]
        packs = first.weight, first.down, last.weight, last.down
        sums = None if ctx.sums is None else grad.new_zeros(len(grad), sum(first.sizes), dtype=torch.float32)
        batch, scalings, grad = len(grad), (first.scaling, last.scaling), matrix(grad).contiguous()
        d_x, *found = ops.packed_attention_backward(
            grad, *saved, *packs, factors, *scalings, cos, sin, scaling, batch, need_x, sums, *around
        )
        if sums is not None:
            for total, part in zip(ctx.sums, sums.split(first.sizes, 1), strict=True):
                total += part
        return *[None] * 5, d_x.view(ctx.shape) if need_x else None, *found
