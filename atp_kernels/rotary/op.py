"""Rotary embedding as one autograd.Function in eager mode; a compiler gets the definition, and fuses it."""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from atp_kernels.call import Operation, Order, register, select
from atp_kernels.rotary import definition

OPERATION = register(
    Operation(
        name="rotary_embedding",
        package=__package__,
        backends=("reference", "triton"),
        # One pass each way where eager PyTorch makes ten launches forward and eighteen backward.
        order={"cuda": Order(("triton", "reference"))},
    )
)


def rotary_embedding(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, index: Tensor | None, width: int, backend: str
) -> tuple[Tensor, Tensor]:
    """Queries and keys rotated, checked."""
    if torch.compiler.is_compiling():
        return definition.rotary_embedding(q, k, cos, sin, index, width)
    choice = select("rotary_embedding", q.device, q.dtype, backend)
    return RotaryEmbedding.apply(choice.module, q, k, cos, sin, index, width)


class RotaryEmbedding(torch.autograd.Function):
    """Saves the angles' cosines and sines, which all layers share."""

    @staticmethod
    def forward(ctx, module, q, k, cos, sin, index, width):
        ctx.module, ctx.size = module, q.shape[-1]
        ctx.save_for_backward(cos, sin, index)
        return tuple(module.forward([q, k], cos, sin, index, width))

    @staticmethod
    @once_differentiable
    def backward(ctx, *grads):
        cos, sin, index = ctx.saved_tensors
        needs = ctx.needs_input_grad[1:3]
        wanted = [grad for grad, need in zip(grads, needs, strict=True) if need]
        found = iter(ctx.module.backward(wanted, cos, sin, index, ctx.size))
        return None, *(next(found) if need else None for need in needs), None, None, None, None
