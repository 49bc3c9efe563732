"""The LoRA linear on a kept slice where Triton is named: the products of the vendor and gathers of ATen there too."""

from atp_kernels import triton_runtime
from atp_kernels.call import Call
from atp_kernels.kept.aten import backward, forward

__all__ = ["backward", "forward", "supports"]


def supports(call: Call) -> str | None:
    """float32, float16 and bfloat16, on CUDA or in the interpreter."""
    return triton_runtime.refuses(call)
