"""The `reference` backend: composed ATen calls with hand-derived gradients, on any device and dtype.

It is the fast path on a CPU, where the vendor GEMM is the whole cost: the adapter is accumulated into the base result
by `addmm_`, absent masks cost nothing, and no gradient is computed that nobody asked for.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from atp_kernels import reference
from atp_kernels.backends.kept import kept_lora_linear_backward, kept_lora_linear_forward
from atp_kernels.backends.primitives import (
    ATEN,
    BLOCK_ELEMENTS,
    Primitives,
    add_product_,
    dropped,
    gated,
    gated_backward,
    scaled_mm,
)
from atp_kernels.call import Call
from atp_kernels.checks import check_written
from atp_kernels.plan import GroupPlan
from atp_kernels.reference import Dropout, compact, factor_norms, group_squares

__all__ = [
    "compact",
    "cross_entropy_",
    "dropped",
    "gated",
    "gated_backward",
    "group_lasso_backward",
    "group_lasso_forward",
    "group_prox_",
    "kept_lora_linear_backward",
    "kept_lora_linear_forward",
    "masked_lora_linear_backward",
    "masked_lora_linear_forward",
]

ADDMM_CHAIN = True


def supports(call: Call) -> str | None:
    """Every call."""
    return None


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
    dropout: Dropout | None = None,
    *,
    primitives: Primitives = ATEN,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """Return (y [M, out], S [M, r], un-masked sum [M, out], row squares of B, column squares of A).

    x and lora_input are 2-D, S = scaling * lora_input A^T; with `dropout`, lora_input is x dropped and is not given.
    The last three results are None unless `keep_sum` (which needs an output mask) or `with_norms` asks for them.
    """
    base_input = primitives.masked(x, in_mask)
    if mask_lora and lora_input is None and dropout is None:
        adapter_input = base_input
    else:
        adapter_input = _adapter_input(x, lora_input, in_mask if mask_lora else None, dropout, primitives)
    down = scaled_mm(adapter_input, lora_a.t(), scaling)
    total = base_input @ weight.t() if bias is None else torch.addmm(bias, base_input, weight.t())
    if mask_lora:
        add_product_(total, down, lora_b.t())
    y = primitives.masked(total, out_mask) if keep_sum else primitives.mask_(total, out_mask)
    if not mask_lora:
        add_product_(y, down, lora_b.t())
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
    dropout: Dropout | None = None,
    *,
    primitives: Primitives = ATEN,
) -> tuple[Tensor | None, ...]:
    """Gradients of (x, weight, lora_a, lora_b, bias, lora_input, out_mask, in_mask), None where `needs` is False.

    `shared_input` says that the adapter read x, through `dropout` if there is one, which is drawn again here. Saved
    tensors that `needs` makes useless may be None.
    With G = dL/dy, Gb = m_out * G, Gl = Gb if mask_lora else G and P = scaling * Gl B:
    dx = m_in * (Gb W), dB = Gl^T S, d lora_input = P A (in-masked with mask_lora), dA = P^T lora_input,
    d m_out = column sums of G * sum, d m_in = column sums of x * (Gb W) (+ lora_input * (P A) with mask_lora).
    """
    need_x, need_w, need_a, need_b, need_bias, need_lora_input, need_out, need_in = needs
    need_adapter = need_lora_input or (shared_input and need_x) or (mask_lora and need_in)
    lora_in_mask = in_mask if mask_lora else None
    d_out = d_a = d_adapter = d_in = None
    if need_out:
        grad_base, d_out = primitives.mask_and_dot(grad_y, total, out_mask)
    else:
        grad_base = primitives.masked(grad_y, out_mask)
    grad_lora = grad_base if mask_lora else grad_y

    # First of all products: the vendor's scratch memory then meets no other gradient.
    d_x = grad_base @ weight if need_x or need_in else None
    d_bias = grad_base.sum(0) if need_bias else None
    d_weight = grad_base.t() @ primitives.masked(x, in_mask) if need_w else None
    d_b = grad_lora.t() @ down if need_b else None
    up = scaled_mm(grad_lora, lora_b, scaling) if need_a or need_adapter else None
    if need_a:
        d_a = up.t() @ _adapter_input(x, lora_input, lora_in_mask, dropout, primitives)

    if need_adapter and not shared_input:
        d_adapter = up @ lora_a
    elif need_adapter and mask_lora:
        _add_adapter_grad(d_x, up, lora_a, dropout, primitives)
    if need_in:
        d_in = primitives.column_dot(x, d_x)
        if mask_lora and not shared_input:
            d_in += primitives.column_dot(lora_input, d_adapter)
    if need_x:
        primitives.mask_(d_x, in_mask)
        if shared_input and not mask_lora:
            _add_adapter_grad(d_x, up, lora_a, dropout, primitives)
    if d_adapter is not None:
        primitives.mask_(d_adapter, lora_in_mask)
    d_x, d_adapter = d_x if need_x else None, d_adapter if need_lora_input else None
    return d_x, d_weight, d_a, d_b, d_bias, d_adapter, d_out, d_in


def _adapter_input(
    x: Tensor, lora_input: Tensor | None, mask: Tensor | None, dropout: Dropout | None, primitives: Primitives
) -> Tensor:
    if dropout is not None:
        return primitives.mask_(primitives.dropped(x, dropout), mask)
    return primitives.masked(x if lora_input is None else lora_input, mask)


def _add_adapter_grad(d_x: Tensor, up: Tensor, lora_a: Tensor, dropout: Dropout | None, primitives: Primitives) -> None:
    if dropout is None:
        add_product_(d_x, up, lora_a)
    else:
        d_x += primitives.dropped(up @ lora_a, dropout)


def group_lasso_forward(
    factors: Sequence[Tensor], plan: GroupPlan, removed: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """Return (value, norms [n_groups]) with norms = sqrt(sum of squares + eps)."""
    norms = group_squares(factors, plan._groups, plan.n_groups).add_(eps).sqrt_()
    # A product with zero would not silence a kept group that holds NaN.
    return torch.where(removed & plan.owned, norms, 0).sum(), norms


def group_lasso_backward(
    factors: Sequence[Tensor], plan: GroupPlan, removed: Tensor, norms: Tensor, grad_out: Tensor
) -> list[Tensor]:
    """d value / d factor = factor / norm of its group, for removed groups; zero elsewhere, whatever is there."""
    slope = torch.where(removed & (norms != 0), grad_out / norms, 0)
    slopes = [slope[index].unsqueeze(1 - axis) for axis, index in plan._groups]
    return [torch.where(by == 0, 0, factor * by).to(factor.dtype) for factor, by in zip(factors, slopes, strict=True)]


def group_lasso_grad_(
    factors: Sequence[Tensor], grads: Sequence[Tensor], plan: GroupPlan, removed: Tensor, weight: Tensor, eps: float
) -> Tensor:
    """Return the value; grads += weight * d value / d factor, one of the shape and dtype of every factor."""
    plan.check(factors)
    check_written(grads, "gradients")
    value, norms = group_lasso_forward(factors, plan, removed, eps)
    for grad, part in zip(grads, group_lasso_backward(factors, plan, removed, norms, weight), strict=True):
        grad += part
    return value


def group_prox_(factors: Sequence[Tensor], plan: GroupPlan, removed: Tensor, threshold: Tensor) -> None:
    """The definition itself: see `reference.group_prox_`."""
    reference.group_prox_(factors, plan._groups, removed, threshold)


def cross_entropy_(logits: Tensor, targets: Tensor) -> Tensor:
    """The definition, on a CPU in blocks of rows: fresh memory for all of them costs more than the softmax does."""
    rows, vocab = logits.shape
    step = max(1, BLOCK_ELEMENTS // vocab) if logits.device.type == "cpu" else max(1, rows)
    blocks = zip(logits.split(step), targets.split(step), strict=True)
    return torch.cat([reference.cross_entropy_(some, indices) for some, indices in blocks])
