"""What lies between the linears of a gated MLP, in ATen calls: activation and product, forward and backward."""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from atp_kernels.call import Call
from atp_kernels.linear.aten import column_dot, mask_, masked
from atp_kernels.mask_gradient.aten import add_dots

ACTIVATIONS: dict[str, tuple[Callable[..., Tensor], Callable[..., Tensor]]] = {
    "silu": (torch.ops.aten.silu, torch.ops.aten.silu_backward),
    "gelu_tanh": (
        partial(torch.ops.aten.gelu, approximate="tanh"),
        partial(torch.ops.aten.gelu_backward, approximate="tanh"),
    ),
}
"""Each activation and its gradient as ATen has them: called with (pre-activation) and, where there is a place for the
result, `out`; with (gradient, pre-activation) and `grad_input`."""


def supports(call: Call) -> str | None:
    """Every call."""
    return None


def gated(activation: str, gate: Tensor, up: Tensor, mask: Tensor | None = None) -> Tensor:
    """act(m * gate) * (m * up) of 2-D tensors, whose rows may lie apart; mask [columns], bool or floating."""
    return ACTIVATIONS[activation][0](masked(gate, mask)).mul_(masked(up, mask))


def gated_backward(
    activation: str,
    d_h: Tensor,
    gate: Tensor,
    up: Tensor,
    d_gate: Tensor,
    d_up: Tensor,
    mask: Tensor | None = None,
    need_mask: bool = False,
    sums: Tensor | None = None,
) -> Tensor | None:
    """Write the gradients of `gated` to d_gate, which may be d_h, and d_up; d_h is lost either way.

    Without a mask d_gate = d_h * up * act'(gate) and d_up = d_h * act(gate). Returns the gradient of the mask, in
    float32 or better, where it is needed. sums [samples, columns]: to the row of each sample the gradient is added that
    a mask of its own would have, beside no mask or a bool one; what that removes is not defined.
    """
    forward, backward = ACTIVATIONS[activation]
    masked_gate = masked(gate, mask)
    forward(masked_gate, out=d_up).mul_(d_h)
    backward(d_h.mul_(masked(up, mask)), masked_gate, grad_input=d_gate)
    d_mask = column_dot(d_gate, gate).add_(column_dot(d_up, up)) if need_mask else None
    if sums is not None:
        add_dots(d_gate, gate, sums)
        add_dots(d_up, up, sums)
    mask_(d_gate, mask)
    mask_(d_up, mask)
    return d_mask
