"""What lies between the linears of a gated MLP, in ATen calls: activation and product, forward and backward."""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from atp_kernels.call import Call

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


def gated(activation: str, gate: Tensor, up: Tensor) -> Tensor:
    """act(gate) * up of 2-D tensors, whose rows may lie apart."""
    return ACTIVATIONS[activation][0](gate).mul_(up)


def gated_backward(activation: str, d_h: Tensor, gate: Tensor, up: Tensor, d_gate: Tensor, d_up: Tensor) -> None:
    """Write d_h * up * act'(gate) to d_gate, which may be d_h, and d_h * act(gate) to d_up; d_h is lost either way."""
    forward, backward = ACTIVATIONS[activation]
    forward(gate, out=d_up).mul_(d_h)
    backward(d_h.mul_(up), gate, grad_input=d_gate)
