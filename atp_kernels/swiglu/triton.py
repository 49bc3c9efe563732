"""What lies between the linears of a gated MLP where Triton is named: ATen's calls."""

from atp_kernels import triton_runtime
from atp_kernels.call import Call
from atp_kernels.swiglu.aten import gated, gated_backward

__all__ = ["gated", "gated_backward", "supports"]


def supports(call: Call) -> str | None:
    """float32, float16 and bfloat16, on CUDA or in the interpreter."""
    return triton_runtime.refuses(call)
