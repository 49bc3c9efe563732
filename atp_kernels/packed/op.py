"""Autograd Functions over packed linears: linears of one input, and a gated MLP. They save what others do."""

from collections.abc import Sequence

import torch
from torch import Tensor

from atp_kernels.call import differentiable_once, matrix, select, unflattened
from atp_kernels.packed import PackedLinears
from atp_kernels.projection import Projection


def packed_linears(x: Tensor, packed: PackedLinears, linears: Sequence[Projection]) -> Tensor:
    """y of all linears side by side, bfloat16 [..., rows of all], for x [..., in] in any floating dtype."""
    result: Tensor = PackedFunction.apply(packed, x.to(torch.bfloat16), *_factors(linears))
    return result


def packed_mlp(
    x: Tensor,
    first: PackedLinears,
    last: PackedLinears,
    linears: Sequence[Projection],
    activation: str,
    mask_grad: Tensor | None = None,
) -> Tensor:
    """down(act(gate(x)) * up(x)), bfloat16 [..., out]: gate and up in `first`, down in `last`, all three in `linears`.

    mask_grad as in `masked_lora_swiglu`.
    """
    operands = x.to(torch.bfloat16), *_factors(linears)
    result: Tensor = PackedMlpFunction.apply(first, last, activation, mask_grad, *operands)
    return result


def _factors(linears: Sequence[Projection]) -> list[Tensor]:
    return [factor for p in linears for factor in (p.lora_a, p.lora_b)]


class PackedFunction(torch.autograd.Function):
    """(pack, x, then lora_a and lora_b of each linear) -> y."""

    @staticmethod
    def forward(ctx, packed, x, *factors):
        packed.load(factors)
        wide = packed.widened(matrix(x))
        ctx.packed, ctx.shape = packed, x.shape
        ctx.save_for_backward(wide, *factors)
        return unflattened(packed.forward(wide), x.shape)

    @staticmethod
    @differentiable_once
    def backward(ctx, grad):
        wide, *factors = ctx.saved_tensors
        d_x, d_factors = ctx.packed.backward(matrix(grad).contiguous(), wide, factors, ctx.needs_input_grad[1])
        return None, None if d_x is None else d_x.view(ctx.shape), *d_factors


class PackedMlpFunction(torch.autograd.Function):
    """(packs, activation, sums or None, x, the factors of gate, up and down) -> y; what down reads is made again."""

    @staticmethod
    def forward(ctx, first, last, activation, sums, x, *factors):
        between = select("masked_lora_swiglu", x.device, x.dtype).module
        first.load(factors[:4])
        last.load(factors[4:])
        wide = first.widened(matrix(x))
        both = first.forward(wide)
        hidden = last.widened(between.gated(activation, *both.split(first.sizes, 1)))
        y = last.forward(hidden)
        ctx.packs, ctx.activation, ctx.sums, ctx.between, ctx.shape = (first, last), activation, sums, between, x.shape
        ctx.save_for_backward(wide, both, last.parts(hidden)[1].clone(), *factors)
        return unflattened(y, x.shape)

    @staticmethod
    @differentiable_once
    def backward(ctx, grad):
        first, last = ctx.packs
        wide, both, s, *factors = ctx.saved_tensors
        gate, up = both.split(first.sizes, 1)
        hidden = wide.new_empty(len(wide), last.weight.shape[1])
        for part, value in zip(last.parts(hidden), (ctx.between.gated(ctx.activation, gate, up), s), strict=True):
            part.copy_(value)
        d_h, d_last = last.backward(matrix(grad).contiguous(), hidden, factors[4:], True)
        d_both = torch.empty_like(both)
        ctx.between.gated_backward(ctx.activation, d_h, gate, up, *d_both.split(first.sizes, 1), sums=ctx.sums)
        d_x, d_first = first.backward(d_both, wide, factors[:4], ctx.needs_input_grad[4])
        return None, None, None, None, None if d_x is None else d_x.view(ctx.shape), *d_first, *d_last
