"""Compaction in C++, on a CPU and on CUDA (csrc/cpu/compact.cpp, csrc/cuda/compact.cu)."""

import torch
from torch import Tensor

from atp_kernels import extension
from atp_kernels.call import Call


def supports(call: Call) -> str | None:
    """float32 and bfloat16 on a CPU, and on CUDA devices that the extension was built for."""
    return extension.refuses(call, cuda=True)


@torch.no_grad()
def compact(weight: Tensor, rows: Tensor | None = None, cols: Tensor | None = None, pad_to: int = 1) -> Tensor:
    """As `aten.compact`, for any dtype of 1 to 8 bytes. Raises RuntimeError for an index out of range."""
    rows, cols = (index if index is None else index.contiguous() for index in (rows, cols))
    return extension.on_device(extension.ops.compact, weight.contiguous(), rows, cols, pad_to)
