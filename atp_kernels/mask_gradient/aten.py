"""Sums over the rows of each sample in ATen calls."""

from torch import Tensor

from atp_kernels.call import Call
from atp_kernels.linear.aten import column_dot


def supports(call: Call) -> str | None:
    """Every call."""
    return None


def add_dots(left: Tensor, right: Tensor, sums: Tensor) -> None:
    """Adds to sums [samples, features] the column sums of left * right [rows, features], as many rows for each."""
    each = max(1, len(left) // max(1, len(sums)))
    for total, some, others in zip(sums, left.split(each), right.split(each), strict=False):
        total += column_dot(some, others)
