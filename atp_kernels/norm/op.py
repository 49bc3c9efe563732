"""RMSNorm in eager mode as one autograd.Function; under torch.compile the definition itself, which a compiler fuses."""

import torch
from torch import Tensor

from atp_kernels.call import Operation, Order, differentiable_once, matrix, register, select, unflattened
from atp_kernels.norm import definition

OPERATION = register(
    Operation(
        name="rms_norm",
        package=__package__,
        backends=("reference", "triton", "native"),
        # One pass where ATen makes five over a float32 copy.
        order={"cpu": Order(("native", "reference")), "cuda": Order(("triton", "reference"))},
    )
)


def rms_norm(x: Tensor, weight: Tensor, eps: float, dtype: torch.dtype, backend: str) -> Tensor:
    """RMSNorm over the last dimension, checked."""
    if torch.compiler.is_compiling():
        return definition.rms_norm(x, weight, eps, dtype)
    choice = select("rms_norm", x.device, x.dtype, backend, result=dtype)
    return RMSNorm.apply(choice.module, x, weight, eps, dtype)


class RMSNorm(torch.autograd.Function):
    """Saves x, one number per row and the weight."""

    @staticmethod
    def forward(ctx, module, x, weight, eps, dtype):
        rows = matrix(x)
        y, scales = module.forward(rows, weight, eps, dtype)
        ctx.module, ctx.shape = module, x.shape
        ctx.save_for_backward(rows, weight, scales)
        return unflattened(y, x.shape)

    @staticmethod
    @differentiable_once
    def backward(ctx, grad_y):
        x, weight, scales = ctx.saved_tensors
        needs = ctx.needs_input_grad[1:3]
        d_x, d_weight = ctx.module.backward(matrix(grad_y), x, weight, scales, *needs)
        return None, None if d_x is None else d_x.view(ctx.shape), d_weight, None, None
