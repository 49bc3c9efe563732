"""RMSNorm, alone or after an addition: an autograd.Function; under torch.compile the definition, which it fuses."""

import torch
from torch import Tensor

from atp_kernels.call import Operation, Order, differentiable_once, matrix, register, select, unflattened
from atp_kernels.norm import aten, definition

BACKENDS = ("reference", "triton", "native")
# One pass where ATen makes five over a float32 copy.
ORDER = {"cpu": Order(("native", "reference")), "cuda": Order(("triton", "reference"))}
register(Operation("rms_norm", __package__, BACKENDS, ORDER))
register(Operation("add_rms_norm", __package__, BACKENDS, ORDER))


def rms_norm(x: Tensor, weight: Tensor, eps: float, dtype: torch.dtype, backend: str) -> Tensor:
    """RMSNorm over the last dimension, checked."""
    if torch.compiler.is_compiling():
        return definition.rms_norm(x, weight, eps, dtype)
    choice = select("rms_norm", x.device, x.dtype, backend, result=dtype)
    return RMSNorm.apply(choice.module, x, weight, eps, dtype)


def add_rms_norm(
    x: Tensor,
    output: Tensor,
    weight: Tensor,
    eps: float,
    multiplier: float,
    dtype: torch.dtype | None,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """x + multiplier * output and its RMSNorm over the last dimension, checked."""
    if torch.compiler.is_compiling():
        return definition.add_rms_norm(x, output, weight, eps, multiplier, dtype)
    wide = torch.promote_types(x.dtype, output.dtype)
    choice = select("add_rms_norm", x.device, wide, backend, result=dtype or wide)
    return AddRMSNorm.apply(choice.module, x, output, weight, eps, multiplier, dtype or wide)


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


class AddRMSNorm(torch.autograd.Function):
    """Saves the sum, one number per row and the weight."""

    @staticmethod
    def forward(ctx, module, x, output, weight, eps, multiplier, dtype):
        stream, y, scales = module.add_forward(matrix(x), matrix(output), weight, eps, multiplier, dtype)
        ctx.set_materialize_grads(False)
        ctx.module, ctx.multiplier, ctx.shape, ctx.output_dtype = module, multiplier, x.shape, output.dtype
        ctx.save_for_backward(stream, weight, scales)
        return unflattened(stream, x.shape), unflattened(y, x.shape)

    @staticmethod
    @differentiable_once
    def backward(ctx, grad_stream, grad_y):
        if grad_stream is None and grad_y is None:
            return (None,) * 7
        stream, weight, scales = ctx.saved_tensors
        need_x, need_output, need_weight = ctx.needs_input_grad[1:4]
        same = ctx.output_dtype == stream.dtype and ctx.multiplier == 1
        output = ctx.output_dtype if need_output and not same else None
        if grad_y is None:
            d_sum, d_weight = grad_stream, None
            d_output = None if output is None else aten.output_grad(d_sum, output, ctx.multiplier)
        else:
            d_sum, d_output, d_weight = ctx.module.add_backward(
                None if grad_stream is None else matrix(grad_stream), matrix(grad_y), stream, weight, scales,
                need_x or need_output, output, ctx.multiplier, need_weight,
            )  # fmt: skip
            # One object where x and output share it, as ATen's addition gives it: two would be taken for two tensors.
            d_sum = None if d_sum is None else d_sum.view(ctx.shape)
            d_output = None if d_output is None else d_output.view(ctx.shape)
        # Autograd casts to the dtype of x where that is another.
        return None, d_sum if need_x else None, d_sum if same and need_output else d_output, d_weight, None, None, None
