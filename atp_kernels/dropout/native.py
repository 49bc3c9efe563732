"""Dropout by position and seed in C++ on a CPU (csrc/cpu/columns.cpp)."""

from torch import Tensor

from atp_kernels import extension
from atp_kernels.call import Call
from atp_kernels.dropout.definition import Dropout


def supports(call: Call) -> str | None:
    """float32 and bfloat16 on a CPU."""
    return extension.refuses(call)


def dropped(values: Tensor, dropout: Dropout) -> Tensor:
    """`definition.dropped`, to the last bit."""
    low, high = map(int, dropout.key)
    seed = low | (high - (high >> 31 << 32)) << 32  # the same 64 bits as a signed integer
    return extension.ops.dropped(values.contiguous(), dropout.threshold, dropout.scale, seed)
