"""RMSNorm in eager mode as one autograd.Function; under torch.compile the definition itself, which a compiler fuses."""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from atp_kernels import reference
from atp_kernels.backends.dispatch import select
from atp_kernels.ops.common import matrix


def rms_norm(x: Tensor, weight: Tensor, eps: float, dtype: torch.dtype, backend: str) -> Tensor:
    """RMSNorm over the last dimension, checked."""
    if torch.compiler.is_compiling():
        return reference.rms_norm(x, weight, eps, dtype)
    return RMSNorm.apply(select("rms_norm", x.device, x.dtype, backend)[0], x, weight, eps, dtype)


class RMSNorm(torch.autograd.Function):
    """x, a number for each of its rows and the weight are all that is saved.

    d weight = column sums of d_y * x * scale.
    """

    @staticmethod
    def forward(ctx, module, x, weight, eps, dtype):
        rows = matrix(x)
        y, scales = module.rms_norm_forward(rows, weight, eps, dtype)
        ctx.module, ctx.shape = module, x.shape
        ctx.save_for_backward(rows, weight, scales)
        return y.view(x.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_y):
        x, weight, scales = ctx.saved_tensors
        grad_y = matrix(grad_y)
        d_x = d_weight = None
        if ctx.needs_input_grad[1]:
            d_x = ctx.module.rms_norm_backward(grad_y, x, weight, scales).view(ctx.shape)
        if ctx.needs_input_grad[2]:
            d_weight = (grad_y.to(scales.dtype) * x * scales.unsqueeze(1)).sum(0).to(weight.dtype)
        return None, d_x, d_weight, None, None
