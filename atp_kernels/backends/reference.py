"""The `reference` backend: composed ATen calls with hand-derived gradients, on any device and dtype.

It is the fast path on a CPU, where the vendor GEMM is the whole cost: the adapter is accumulated into the base result
by `addmm_`, absent masks cost nothing, and no gradient is computed that nobody asked for.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from atp_kernels.reference import Groups, compact, factor_norms, group_prox_, group_squares, owned_groups

__all__ = [
    "compact",
    "group_lasso_backward",
    "group_lasso_forward",
    "group_prox_",
    "masked_lora_linear_backward",
    "masked_lora_linear_forward",
]

AVAILABLE = True
REASON = None

_BLOCK_ELEMENTS = 2**17


def masked_lora_linear_forward(
    x: Tensor,
    weight: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    bias: Tensor | None,
    lora_input: Tensor | None,
    out_mask: Tensor | None,
    in_mask: Tensor | None,
    scaling: float,
    mask_lora: bool,
    keep_sum: bool,
    with_norms: bool,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """Return (y [M, out], S [M, r], un-masked sum [M, out], row squares of B, column squares of A).

    x and lora_input are 2-D, S = scaling * lora_input A^T. The last three results are None unless `keep_sum` (which
    needs an output mask) or `with_norms` asks for them.
    """
    base_input = masked(x, in_mask)
    adapter_input = base_input if mask_lora else x
    if lora_input is not None:
        adapter_input = masked(lora_input, in_mask) if mask_lora else lora_input
    down = scaled_mm(adapter_input, lora_a.t(), scaling)
    total = base_input @ weight.t() if bias is None else torch.addmm(bias, base_input, weight.t())
    if mask_lora:
        total.addmm_(down, lora_b.t())
    y = total if out_mask is None else masked(total, out_mask) if keep_sum else mask_(total, out_mask)
    if not mask_lora:
        y.addmm_(down, lora_b.t())
    norms = factor_norms(lora_a, lora_b) if with_norms else (None, None)
    return y, down, total if keep_sum else None, *norms


def masked_lora_linear_backward(
    grad_y: Tensor,
    x: Tensor | None,
    weight: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    lora_input: Tensor | None,
    out_mask: Tensor | None,
    in_mask: Tensor | None,
    down: Tensor | None,
    total: Tensor | None,
    scaling: float,
    mask_lora: bool,
    shared_input: bool,
    needs: Sequence[bool],
) -> tuple[Tensor | None, ...]:
    """Gradients of (x, weight, lora_a, lora_b, bias, lora_input, out_mask, in_mask), None where `needs` is False.

    `shared_input` says that the adapter read x. Saved tensors that `needs` makes useless may be None.
    With G = dL/dy, Gb = m_out * G, Gl = Gb if mask_lora else G and P = scaling * Gl B:
    dx = m_in * (Gb W), dB = Gl^T S, d lora_input = P A (in-masked with mask_lora), dA = P^T lora_input,
    d m_out = column sums of G * sum, d m_in = column sums of x * (Gb W) (+ lora_input * (P A) with mask_lora).
    """
    need_x, need_w, need_a, need_b, need_bias, need_adapter, need_out, need_in = needs
    grad_base = masked(grad_y, out_mask)
    grad_lora = grad_base if mask_lora else grad_y
    need_adapter = need_adapter or (shared_input and need_x) or (mask_lora and need_in)

    d_out = column_dot(grad_y, total) if need_out else None
    d_bias = grad_base.sum(0) if need_bias else None
    d_weight = grad_base.t() @ masked(x, in_mask) if need_w else None
    d_b = grad_lora.t() @ down if need_b else None
    d_a = d_adapter = d_in = None
    up = scaled_mm(grad_lora, lora_b, scaling) if need_a or need_adapter else None
    if need_a:
        adapter_input = x if shared_input else lora_input
        d_a = up.t() @ (masked(adapter_input, in_mask) if mask_lora else adapter_input)

    d_x = grad_base @ weight if need_x or need_in else None
    if need_adapter and not shared_input:
        d_adapter = up @ lora_a
    elif need_adapter and mask_lora:
        d_x.addmm_(up, lora_a)
    if need_in:
        d_in = column_dot(x, d_x)
        if mask_lora and not shared_input:
            d_in += column_dot(lora_input, d_adapter)
    if need_x:
        mask_(d_x, in_mask)
        if shared_input and not mask_lora:
            d_x.addmm_(up, lora_a)
    if d_adapter is not None and mask_lora:
        mask_(d_adapter, in_mask)
    found = (d_x, d_weight, d_a, d_b, d_bias, d_adapter, d_out, d_in)
    return tuple(grad if need else None for grad, need in zip(found, needs, strict=True))


def group_lasso_forward(
    factors: Sequence[Tensor], groups: Groups, removed: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """Return (value, norms [n_groups]) with norms = sqrt(sum of squares + eps)."""
    norms = group_squares(factors, groups, removed.numel()).add_(eps).sqrt_()
    return norms.mul(removed & owned_groups(groups, removed)).sum(), norms


def group_lasso_backward(
    factors: Sequence[Tensor], groups: Groups, removed: Tensor, norms: Tensor, grad_out: Tensor
) -> list[Tensor]:
    """d value / d factor = factor / norm of its group, for removed groups; zero elsewhere."""
    slope = torch.where(removed & (norms > 0), grad_out / norms, 0)
    return [
        (factor * slope[index].unsqueeze(1 - axis)).to(factor.dtype)
        for factor, (axis, index) in zip(factors, groups, strict=True)
    ]


def scaled_mm(left: Tensor, right: Tensor, scaling: float) -> Tensor:
    """scaling * (left @ right), rounded once."""
    unread = left.new_empty(1, 1)
    return torch.addmm(unread, left, right, beta=0, alpha=scaling)


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


def _blocks(values: Tensor, operand: Tensor) -> Sequence[Tensor]:
    """`values` in blocks of rows that stay in cache where ATen would make a wide copy of all of it.

    On a CPU, 16-bit values times a float32 mask took 5.3 ms whole and 0.6 ms in blocks (768 x 1536, one thread).
    """
    if values.device.type != "cpu" or operand.dtype in (torch.bool, values.dtype):
        return (values,)
    return values.split(max(1, _BLOCK_ELEMENTS // max(1, values.shape[1])))
