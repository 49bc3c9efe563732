"""The LoRA linear without masks, dropout and norms in eager mode: the `addmm_` chain as one autograd.Function."""

import torch
from torch.autograd.function import once_differentiable

from atp_kernels.backends.primitives import add_product_, scaled_mm
from atp_kernels.call import matrix


class LoraLinear(torch.autograd.Function):
    """y = x W^T + bias + S B^T with S = scaling * x A^T, to the last bit what `backends.reference` makes of it.

    Every branch and call of Python that the masked linear has and this one does without is time in which no product
    runs: hundreds of small ones in a step cannot hide it. With G = dL/dy and P = scaling * G B:
    dx = G W + P A, dW = G^T x, dA = P^T x, dB = G^T S, d bias = column sums of G.
    """

    @staticmethod
    def forward(ctx, x, weight, lora_a, lora_b, bias, scaling):
        _, need_w, need_a, need_b, _, _ = ctx.needs_input_grad
        rows = matrix(x)
        down = scaled_mm(rows, lora_a.t(), scaling)
        y = torch.mm(rows, weight.t()) if bias is None else torch.addmm(bias, rows, weight.t())
        add_product_(y, down, lora_b.t())
        ctx.scaling, ctx.shape = scaling, x.shape
        ctx.save_for_backward(rows if need_w or need_a else None, weight, lora_a, lora_b, down if need_b else None)
        return y if rows is x else y.view(*x.shape[:-1], weight.shape[0])

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_y):
        x, weight, lora_a, lora_b, down = ctx.saved_tensors
        need_x, need_w, need_a, need_b, need_bias, _ = ctx.needs_input_grad
        grad_y = matrix(grad_y)
        # First of all products: the vendor's scratch memory then meets no other gradient.
        d_x = torch.mm(grad_y, weight) if need_x else None
        d_bias = grad_y.sum(0) if need_bias else None
        d_weight = torch.mm(grad_y.t(), x) if need_w else None
        d_b = torch.mm(grad_y.t(), down) if need_b else None
        up = scaled_mm(grad_y, lora_b, ctx.scaling) if need_x or need_a else None
        d_a = torch.mm(up.t(), x) if need_a else None
        if need_x:
            add_product_(d_x, up, lora_a)
            d_x = d_x if len(ctx.shape) == 2 else d_x.view(ctx.shape)
        return d_x, d_weight, d_a, d_b, d_bias, None
