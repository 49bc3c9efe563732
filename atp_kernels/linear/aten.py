"""The masked LoRA linear in ATen calls with hand-derived gradients, on any device and dtype.

Without masks it is the fast path on a CPU, where the vendor GEMM is the whole cost: the base is added to the adapter's
product by `addmm_`, absent masks cost nothing, and no gradient is computed that nobody asked for. What is done around
the products are `Primitives`, of which another backend may have its own.
"""

# Which of the saved tensors are None follows from `needs`, which a type checker cannot see.
# mypy: disable-error-code="union-attr,operator,arg-type,assignment"

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from atp_kernels.call import CACHED_ELEMENTS, Call
from atp_kernels.dropout.aten import dropped
from atp_kernels.dropout.definition import Dropout
from atp_kernels.linear.operands import Gradients, Needs, Operands, Options, Results, Saved

ADDMM_CHAIN = True
"""Whether a linear without masks and dropout is what `op.LoraLinear` computes, which then does it at less cost."""


def supports(call: Call) -> str | None:
    """Every call."""
    return None


def scaled_mm(left: Tensor, right: Tensor, scaling: float) -> Tensor:
    """scaling * (left @ right), rounded once."""
    if scaling == 1:
        return torch.mm(left, right)
    unread = left.new_empty(left.shape[0], right.shape[1])
    return unread.addmm_(left, right, beta=0, alpha=scaling)


def sum_of_products(
    left: Tensor,
    right: Tensor,
    low: Tensor | None,
    high: Tensor,
    bias: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """left @ right + low @ high + bias, where low [M, r] and high [r, N] are the adapter's, or low is None.

    The adapter comes first: the large product adds to what it finds where it writes anyway, while an adapter that is
    added to its result reads and writes all of that again. One of rank 0, which is part of the weight, costs nothing.
    """
    if low is not None and low.shape[1]:
        total = torch.mm(low, high, out=out) if bias is None else torch.addmm(bias, low, high, out=out)
        return total.addmm_(left, right)
    return torch.mm(left, right, out=out) if bias is None else torch.addmm(bias, left, right, out=out)


def masked(values: Tensor, mask: Tensor | None) -> Tensor:
    """values * mask in the dtype of `values`; `values` itself when there is no mask."""
    if mask is None:
        return values
    result = torch.empty_like(values)
    for source, target in zip(_blocks(values, mask), _blocks(result, mask), strict=True):
        torch.mul(source, mask, out=target)
    return result


def mask_(values: Tensor, mask: Tensor | None) -> Tensor:
    """`masked` in place."""
    for block in () if mask is None else _blocks(values, mask):
        block.mul_(mask)
    return values


def column_dot(left: Tensor, right: Tensor) -> Tensor:
    """Column sums of left * right, in float32 or better."""
    total = torch.zeros(left.shape[1], dtype=torch.promote_types(left.dtype, torch.float32), device=left.device)
    for some, others in zip(_blocks(left, total), _blocks(right, total), strict=True):
        total += (some.to(total.dtype) * others).sum(0)
    return total


def mask_and_dot(grad: Tensor, total: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """`masked(grad, mask)` and `column_dot(grad, total)`: what the decision step's backward reads both tensors for."""
    return masked(grad, mask), column_dot(grad, total)


class Primitives(NamedTuple):
    """Each is called as the function of its name in this module, and returns what that returns."""

    masked: Callable[[Tensor, Tensor | None], Tensor] = masked
    mask_: Callable[[Tensor, Tensor | None], Tensor] = mask_
    column_dot: Callable[[Tensor, Tensor], Tensor] = column_dot
    mask_and_dot: Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]] = mask_and_dot
    dropped: Callable[[Tensor, Dropout], Tensor] = dropped


ATEN = Primitives()


def forward(operands: Operands, options: Options, *, primitives: Primitives = ATEN) -> Results:
    """The results that the options ask for; keep_sum needs an output mask. With dropout, lora_input is not given."""
    x, weight, lora_a, lora_b, bias, lora_input, out_mask, in_mask = operands
    scaling, mask_lora, keep_sum, dropout = options
    base_input = primitives.masked(x, in_mask)
    if mask_lora and lora_input is None and dropout is None:
        adapter_input = base_input
    else:
        adapter_input = _adapter_input(x, lora_input, in_mask if mask_lora else None, dropout, primitives)
    s = scaled_mm(adapter_input, lora_a.t(), scaling)
    in_sum = mask_lora or out_mask is None  # whether the mask, if there is one, covers the adapter
    total = sum_of_products(base_input, weight.t(), s if in_sum else None, lora_b.t(), bias)
    y = primitives.masked(total, out_mask) if keep_sum else primitives.mask_(total, out_mask)
    if not in_sum and s.shape[1]:
        y.addmm_(s, lora_b.t())
    return Results(y, s, total if keep_sum else None)


def backward(
    grad_y: Tensor, saved: Saved, options: Options, needs: Needs, *, primitives: Primitives = ATEN
) -> Gradients:
    """The wanted gradients; dropout is drawn again.

    With G = dL/dy, Gb = m_out * G, Gl = Gb if mask_lora else G and P = scaling * Gl B:
    dx = m_in * (Gb W), dB = Gl^T S, d lora_input = P A (in-masked with mask_lora), dA = P^T lora_input,
    d m_out = column sums of G * sum, d m_in = column sums of x * (Gb W) (+ lora_input * (P A) with mask_lora).
    """
    x, weight, lora_a, lora_b, lora_input, out_mask, in_mask, s, total = saved
    need_x, need_w, need_a, need_b, need_bias, need_lora_input, need_out, need_in, shared_input = needs
    scaling, mask_lora, dropout = options.scaling, options.mask_lora, options.dropout
    need_adapter = need_lora_input or (shared_input and need_x) or (mask_lora and need_in)
    lora_in_mask = in_mask if mask_lora else None
    d_x = d_out = d_a = d_adapter = d_in = None
    if need_out:
        grad_base, d_out = primitives.mask_and_dot(grad_y, total, out_mask)
    else:
        grad_base = primitives.masked(grad_y, out_mask)
    grad_lora = grad_base if mask_lora else grad_y

    up = scaled_mm(grad_lora, lora_b, scaling) if need_a or need_adapter else None
    in_sum = mask_lora or in_mask is None
    # Before the other gradients: the vendor's scratch memory then meets none of them but P.
    if need_x or need_in:
        low = up if need_adapter and shared_input and in_sum and dropout is None else None
        d_x = sum_of_products(grad_base, weight, low, lora_a)
    if need_adapter and not shared_input:
        d_adapter = up @ lora_a
    elif need_adapter and in_sum and dropout is not None:
        d_x += primitives.dropped(up @ lora_a, dropout)
    if need_in:
        d_in = primitives.column_dot(x, d_x)
        if mask_lora and not shared_input:
            d_in += primitives.column_dot(lora_input, d_adapter)
    if need_x:
        primitives.mask_(d_x, in_mask)
        if shared_input and not in_sum and dropout is not None:
            d_x += primitives.dropped(up @ lora_a, dropout)
        elif shared_input and not in_sum and up.shape[1]:
            d_x.addmm_(up, lora_a)
    if d_adapter is not None:
        primitives.mask_(d_adapter, lora_in_mask)
    d_x, d_adapter = d_x if need_x else None, d_adapter if need_lora_input else None
    d_bias = grad_base.sum(0) if need_bias else None
    d_weight = grad_base.t() @ primitives.masked(x, in_mask) if need_w else None
    d_b = grad_lora.t() @ s if need_b else None
    if need_a:
        d_a = up.t() @ _adapter_input(x, lora_input, lora_in_mask, dropout, primitives)
    return d_x, d_weight, d_a, d_b, d_bias, d_adapter, d_out, d_in


def _adapter_input(
    x: Tensor, lora_input: Tensor | None, mask: Tensor | None, dropout: Dropout | None, primitives: Primitives
) -> Tensor:
    if dropout is not None:
        return primitives.mask_(primitives.dropped(x, dropout), mask)
    return primitives.masked(x if lora_input is None else lora_input, mask)


def _blocks(values: Tensor, operand: Tensor) -> Sequence[Tensor]:
    """`values` in blocks of rows that stay in cache where ATen would make a wide copy of all of it.

    On a CPU, 16-bit values times a float32 mask took 5.3 ms whole and 0.6 ms in blocks (768 x 1536, one thread).
    """
    if values.device.type != "cpu" or operand.dtype in (torch.bool, values.dtype):
        return (values,)
    return values.split(max(1, CACHED_ELEMENTS // max(1, values.shape[1])))
