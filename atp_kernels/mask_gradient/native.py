"""Sums over the rows of each sample in C++ on a CPU (csrc/cpu/columns.cpp)."""

import torch
from torch import Tensor

from atp_kernels import extension
from atp_kernels.call import Call
from atp_kernels.mask_gradient import aten


def supports(call: Call) -> str | None:
    """float32 and bfloat16 on a CPU."""
    return extension.refuses(call)


def add_dots(left: Tensor, right: Tensor, sums: Tensor) -> None:
    """`aten.add_dots`: float32 over blocks of 64 rows, float64 over the blocks."""
    if fits(sums) and left.dtype == right.dtype:
        extension.ops.add_sample_dots(left.contiguous(), right.contiguous(), sums)
    else:
        aten.add_dots(left, right, sums)


def fits(sums: Tensor) -> bool:
    """Whether C++ adds to these sums where they lie."""
    in_rows = sums.stride(1) == 1 and (len(sums) == 1 or sums.stride(0) >= sums.shape[1])
    return sums.dtype == torch.float32 and sums.numel() > 0 and in_rows
