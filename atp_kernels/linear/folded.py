"""The masked LoRA linear as one product with one folded weight: masks and adapter are multiplied into a copy of it."""

import torch
from torch import Tensor

from atp_kernels.call import differentiable_once, matrix, select, unflattened
from atp_kernels.linear.aten import column_dot, scaled_mm
from atp_kernels.linear.operands import Operands


def refuses(operands: Operands, mask_lora: bool) -> str | None:
    """Why the folded product cannot take operands that are checked and cast, None where it can."""
    _, weight, _, _, bias, lora_input, *masks = operands
    learns = torch.is_grad_enabled()
    if lora_input is not None:
        return "the adapter has an input of its own"
    if learns and (weight.requires_grad or (bias is not None and bias.requires_grad)):
        return "the weight or bias has a gradient"
    if learns and any(mask is not None and mask.requires_grad for mask in masks):
        if not mask_lora:
            return "a mask that has a gradient does not cover the adapter"
        if weight.dtype == torch.float16:
            return "float16 cannot hold what a mask near zero leaves"
    return None


def folded_linear(operands: Operands, scaling: float, mask_lora: bool) -> Tensor:
    """`FoldedLoraLinear` of operands that `refuses` takes: y [..., out]."""
    x, weight, lora_a, lora_b, bias, _, out_mask, in_mask = operands
    return FoldedLoraLinear.apply(x, weight, lora_a, lora_b, bias, out_mask, in_mask, scaling, mask_lora)


class FoldedLoraLinear(torch.autograd.Function):
    """y = x V^T + c, one product each way, with V = m_out W m_in + scaling * B' A' and c = m_out * bias.

    m_out and m_in scale rows and columns; with mask_lora B' = m_out B and A' = A m_in, else B' = B and A' = A. W and
    bias are frozen. With G = dL/dy, S = scaling * x A'^T and P = scaling * G B':

        dx = G V,  dB' = G^T S,  dA' = P^T x,  and with mask_lora dB = m_out dB',  dA = dA' m_in
        d m_out = (column sums of G * y) / m_out,  d m_in = (column sums of x * dx) / m_in

    since y is m_out times the sum before it, which is not saved, and dx is m_in times what reaches it. For these
    quotients a mask that has a gradient is kept away from zero: where it is closer than 2^-40 (float64: 2^-128), V has
    2^-40 of the row instead, so that a removed output is below 2^-40 of what it removes, and the gradient there is that
    of the definition too. V is made once per forward pass and saved; y is saved where d m_out is wanted, so that
    changing it in place before the backward pass is an error of autograd.
    """

    @staticmethod
    def forward(ctx, x, weight, lora_a, lora_b, bias, out_mask, in_mask, scaling, mask_lora):
        _, _, need_a, need_b, _, need_out, need_in, *_ = ctx.needs_input_grad
        rows = matrix(x)
        out_mask, in_mask = (_off_zero(m) if need else m for m, need in ((out_mask, need_out), (in_mask, need_in)))
        a, b = _masked_factors(lora_a, lora_b, out_mask, in_mask) if mask_lora else (lora_a, lora_b)
        folded = weight if out_mask is None else (weight * out_mask.unsqueeze(1)).to(weight.dtype)
        folded = folded if in_mask is None else (folded * in_mask).to(weight.dtype)
        # A product of the rank alone is small beside one that reads and writes y, but V must be a copy.
        folded = torch.addmm(folded, b, a, alpha=scaling) if a.shape[0] else folded
        if bias is None:
            y = torch.mm(rows, folded.t())
        else:
            bias = bias if out_mask is None else (bias * out_mask).to(bias.dtype)
            y = torch.addmm(bias, rows, folded.t())
        ctx.scaling, ctx.mask_lora, ctx.shape = scaling, mask_lora, x.shape
        ctx.save_for_backward(
            rows if need_a or need_in else None,
            folded,
            lora_a,
            lora_b,
            scaled_mm(rows, a.t(), scaling) if need_b else None,
            out_mask,
            in_mask,
            y if need_out else None,
        )
        return unflattened(y, x.shape)

    @staticmethod
    @differentiable_once
    def backward(ctx, grad_y):
        x, folded, lora_a, lora_b, s, out_mask, in_mask, y = ctx.saved_tensors
        need_x, _, need_a, need_b, _, need_out, need_in, *_ = ctx.needs_input_grad
        grad_y = matrix(grad_y)
        d_a = d_b = d_out = d_in = None
        d_x = torch.mm(grad_y, folded) if need_x or need_in else None
        if need_b:
            d_b = torch.mm(grad_y.t(), s)
        if need_a:
            b = _masked_factors(lora_a, lora_b, out_mask, None)[1] if ctx.mask_lora else lora_b
            d_a = torch.mm(scaled_mm(grad_y, b, ctx.scaling).t(), x)
        if ctx.mask_lora and (need_a or need_b):
            d_a, d_b = _masked_factors(d_a, d_b, out_mask, in_mask)
        if need_out or need_in:
            dot = getattr(select("masked_lora_linear", folded.device, folded.dtype).module, "column_dot", column_dot)
            d_out = dot(grad_y, y) / out_mask if need_out else None
            d_in = dot(x, d_x) / in_mask if need_in else None
        d_x = d_x.view(ctx.shape) if need_x else None
        return d_x, None, d_a, d_b, None, d_out, d_in, None, None


def _off_zero(mask: Tensor) -> Tensor:
    """The mask, with what is too close to zero to divide by moved away from it."""
    least = 2.0 ** (-128 if mask.dtype == torch.float64 else -40)
    return torch.where(mask.abs() < least, torch.full_like(mask, least), mask)


def _masked_factors(
    lora_a: Tensor | None, lora_b: Tensor | None, out_mask: Tensor | None, in_mask: Tensor | None
) -> tuple[Tensor | None, Tensor | None]:
    """(A m_in, m_out B) in their own dtypes."""
    a = lora_a if lora_a is None or in_mask is None else (lora_a * in_mask).to(lora_a.dtype)
    b = lora_b if lora_b is None or out_mask is None else (lora_b * out_mask.unsqueeze(1)).to(lora_b.dtype)
    return a, b
