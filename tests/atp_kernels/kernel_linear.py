"""The Triton backend's linear with a chosen tile, under autograd."""

import torch
from backends_here import ON_GPU
from linear_cases import with_gradients

from atp_kernels.linear import triton as launcher
from atp_kernels.linear.operands import Needs, Operands, Options, Saved

# The interpreter cuts a float32 off to bfloat16 where a GPU rounds it.
FACTOR = {torch.float32: 2.0, torch.float16: 2.0, torch.bfloat16: 2.0 if ON_GPU else 3.0}
ORDER = ("x", "weight", "lora_a", "lora_b", "bias", "lora_input", "out_mask", "in_mask")


class KernelLinear(torch.autograd.Function):
    """The backend's forward and backward with a chosen tile, as `linear.op.MaskedLoraLinear` calls them."""

    @staticmethod
    def forward(ctx, config, shape, *tensors):
        ctx.tensors, ctx.config, ctx.shape = tensors, config, shape
        keep_sum = tensors[6] is not None and ctx.needs_input_grad[8]
        options = Options(shape.scaling, shape.mask_lora, keep_sum, True, shape.drawn)
        y, ctx.s, ctx.total, *norms = launcher.forward(Operands(*tensors), options, config=config)
        return y, *norms

    @staticmethod
    def backward(ctx, grad_y, grad_rows, grad_cols):
        x, weight, lora_a, lora_b, _, lora_input, out_mask, in_mask = ctx.tensors
        saved = Saved(x, weight, lora_a, lora_b, lora_input, out_mask, in_mask, ctx.s, ctx.total)
        options = Options(ctx.shape.scaling, ctx.shape.mask_lora, dropout=ctx.shape.drawn)
        needs = Needs(*ctx.needs_input_grad[2:], shared_input=lora_input is None)
        grads = list(launcher.backward(grad_y, saved, options, needs, config=ctx.config))
        grads[2] = grads[2] + (2 * grad_cols * lora_a).to(lora_a.dtype)
        grads[3] = grads[3] + (2 * grad_rows[:, None] * lora_b).to(lora_b.dtype)
        return None, None, *grads


def run(shape, tensors, config):
    return with_gradients(KernelLinear.apply(config, shape, *(tensors.get(name) for name in ORDER)), tensors)
