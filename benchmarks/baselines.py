"""What the kernels are measured against."""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def unfused(
    x: Tensor,
    weight: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    out_mask: Tensor | None = None,
    in_mask: Tensor | None = None,
    mask_sum: bool = False,
) -> Tensor:
    """The masked PEFT way: every operation on its own, gradients by autograd."""
    base = (x if in_mask is None else x * in_mask.to(x.dtype)) @ weight.T
    lora = (x @ lora_a.T) @ lora_b.T
    if out_mask is None:
        return base + lora
    mask = out_mask.to(x.dtype)
    return (base + lora) * mask if mask_sum else base * mask + lora


class AddmmLora(torch.autograd.Function):
    """The `addmm_` idiom of today's fast LoRA libraries: the adapter accumulated into the base product; no masks."""

    @staticmethod
    def forward(ctx, x, weight, lora_a, lora_b):
        down = x @ lora_a.T
        ctx.save_for_backward(x, weight, lora_a, lora_b, down)
        return (x @ weight.T).addmm_(down, lora_b.T)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        x, weight, lora_a, lora_b, down = ctx.saved_tensors
        up = grad @ lora_b
        d_x = (grad @ weight).addmm_(up, lora_a)
        _, _, need_a, need_b = ctx.needs_input_grad
        return d_x, None, up.T @ x if need_a else None, grad.T @ down if need_b else None
