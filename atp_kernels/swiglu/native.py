"""SiLU between the linears of a gated MLP in C++ on a CPU (csrc/cpu/activations.cpp); GELU is ATen's."""

from torch import Tensor

from atp_kernels import extension
from atp_kernels.call import Call
from atp_kernels.swiglu import aten


def supports(call: Call) -> str | None:
    """float32 and bfloat16 on a CPU."""
    return extension.refuses(call)


def gated(activation: str, gate: Tensor, up: Tensor) -> Tensor:
    """`aten.gated`: SiLU in one pass, computed in float32 and rounded once."""
    if activation != "silu" or not _unit_stride(gate, up):
        return aten.gated(activation, gate, up)
    return extension.ops.swiglu_forward(gate, up)


def gated_backward(activation: str, d_h: Tensor, gate: Tensor, up: Tensor, d_gate: Tensor, d_up: Tensor) -> None:
    """`aten.gated_backward`, as `gated`; this one leaves d_h as it was unless it is d_gate."""
    if activation != "silu" or not _unit_stride(d_h, gate, up, d_gate, d_up):
        aten.gated_backward(activation, d_h, gate, up, d_gate, d_up)
    else:
        extension.ops.swiglu_backward(d_h, gate, up, d_gate, d_up)


def _unit_stride(*matrices: Tensor) -> bool:
    return all(matrix.stride(1) == 1 for matrix in matrices)
