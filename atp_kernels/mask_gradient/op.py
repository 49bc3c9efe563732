"""An identity whose backward pass also sums: one autograd.Function in eager mode, plain operations for a compiler."""

import torch
from torch import Tensor

from atp_kernels.call import Operation, Order, differentiable_once, matrix, register, select

OPERATION = register(
    Operation(
        name="mask_gradient",
        package=__package__,
        backends=("reference", "native"),
        order={"cpu": Order(("native", "reference"))},
    )
)


def mask_gradient(y: Tensor, sums: Tensor, backend: str) -> Tensor:
    """y, checked."""
    module = select("mask_gradient", y.device, y.dtype, backend).module
    result: Tensor = MaskGradient.apply(module, sums, y)
    return result


class MaskGradient(torch.autograd.Function):
    """Saves y, which what reads it saves too, in most blocks."""

    @staticmethod
    def forward(ctx, module, sums, y):
        ctx.module, ctx.sums = module, sums
        ctx.save_for_backward(y)
        return y.view_as(y)

    @staticmethod
    @differentiable_once
    def backward(ctx, grad):
        (y,) = ctx.saved_tensors
        if y.numel():
            ctx.module.add_dots(matrix(grad), matrix(y), ctx.sums)
        return None, None, grad
