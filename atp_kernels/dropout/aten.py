"""Dropout by position and seed in ATen calls."""

from torch import Tensor

from atp_kernels.call import CACHED_ELEMENTS, Call
from atp_kernels.dropout import definition
from atp_kernels.dropout.definition import Dropout


def supports(call: Call) -> str | None:
    """Every call."""
    return None


def dropped(values: Tensor, dropout: Dropout) -> Tensor:
    """`definition.dropped`, with its random words in blocks of rows that stay in cache."""
    result = values.new_empty(values.shape)
    step = max(1, CACHED_ELEMENTS // max(1, values.shape[1]))
    for first in range(0, values.shape[0], step):
        rows = slice(first, first + step)
        result[rows] = definition.dropped(values[rows], dropout, first)
    return result
