"""Sums over the rows of each sample in ATen calls."""

import torch
from torch import Tensor

from atp_kernels.call import Call
from atp_kernels.linear.aten import column_dot

IN_TURN = ("cpu",)
"""Devices on which samples come one by one, in blocks that stay in cache; on others a launch costs more."""


def supports(call: Call) -> str | None:
    """Every call."""
    return None


def add_dots(left: Tensor, right: Tensor, sums: Tensor) -> None:
    """Adds to sums [samples, features] the column sums of left * right [rows, features], as many rows for each."""
    each = max(1, len(left) // max(1, len(sums)))
    if left.device.type not in IN_TURN:
        wide = torch.promote_types(left.dtype, torch.float32)
        sums += (left.to(wide) * right).unflatten(0, (len(sums), each)).sum(1)
        return
    for total, some, others in zip(sums, left.split(each), right.split(each), strict=False):
        total += column_dot(some, others)
