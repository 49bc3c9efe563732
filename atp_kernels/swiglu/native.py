"""What lies between the linears of a gated MLP in C++ on a CPU (csrc/cpu/activations.cpp)."""

from torch import Tensor

from atp_kernels import extension
from atp_kernels.call import Call
from atp_kernels.linear.native import column_dot, mask_, masked
from atp_kernels.mask_gradient.native import fits
from atp_kernels.swiglu import aten

GELU = "gelu_tanh"
"""The activation beside SiLU, by its name in `aten.ACTIVATIONS`."""


def supports(call: Call) -> str | None:
    """float32 and bfloat16 on a CPU."""
    return extension.refuses(call)


def gated(activation: str, gate: Tensor, up: Tensor, mask: Tensor | None = None) -> Tensor:
    """`aten.gated` in one pass over the masked operands, computed in float32 and rounded once."""
    if not _unit_stride(gate, up):
        return aten.gated(activation, gate, up, mask)
    return extension.ops.swiglu_forward(masked(gate, mask), masked(up, mask), activation == GELU)


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
    """`aten.gated_backward`, as `gated`; this one leaves d_h as it was unless it is d_gate."""
    in_one_piece = mask is None or (d_gate.is_contiguous() and d_up.is_contiguous())
    in_one_piece &= sums is None or fits(sums)
    if not in_one_piece or not _unit_stride(d_h, gate, up, d_gate, d_up):
        return aten.gated_backward(activation, d_h, gate, up, d_gate, d_up, mask, need_mask, sums)
    gelu = activation == GELU
    extension.ops.swiglu_backward(d_h, masked(gate, mask), masked(up, mask), d_gate, d_up, sums, gelu)
    d_mask = column_dot(d_gate, gate).add_(column_dot(d_up, up)) if need_mask else None
    mask_(d_gate, mask)
    mask_(d_up, mask)
    return d_mask


def _unit_stride(*matrices: Tensor) -> bool:
    return all(matrix.stride(1) == 1 for matrix in matrices)
