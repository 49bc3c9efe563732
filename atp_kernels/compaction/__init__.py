"""Compaction: the kept rows and columns of a weight."""

import torch
from torch import Tensor

from atp_kernels.checks import check_range, refuse_capture
from atp_kernels.compaction import op
from atp_kernels.kinds import typed


@typed
def compact(
    weight: Tensor,
    rows: Tensor | None = None,
    cols: Tensor | None = None,
    pad_to: int = 1,
    *,
    backend: str = "auto",
) -> Tensor:
    """The kept rows and columns of a weight as a new tensor, without gradient.

    weight [n, k]; rows and cols: int64 index vectors, or bool masks [n] and [k] that keep what is True, None for all.
    Returns [n', k'], where a gathered side is padded with zeros to a multiple of `pad_to` and the other side is as it
    was. Waits for the device to look at the indices. Raises ValueError for wrong shapes, dtypes or devices, or an index
    that is negative or too large, and RuntimeError while a CUDA graph is captured.
    Source: docs/method.md section 6.

    >>> weight = torch.arange(6).view(2, 3)
    >>> compact(weight, cols=torch.tensor([True, False, True]))
    tensor([[0, 2],
            [3, 5]])
    >>> compact(weight, rows=torch.tensor([1]), pad_to=2)
    tensor([[3, 4, 5],
            [0, 0, 0]])
    """
    if weight.ndim != 2:
        raise ValueError(f"compact takes a 2-D weight, not one of shape {list(weight.shape)}.")
    for (name, index), size in zip((("rows", rows), ("cols", cols)), weight.shape, strict=True):
        if index is None:
            continue
        if index.ndim != 1 or index.dtype not in (torch.int64, torch.bool) or index.device != weight.device:
            raise ValueError(
                f"{name} must be a 1-D int64 tensor on {weight.device}, or a bool mask there, or None for all."
            )
        if index.dtype == torch.bool and (len(index) != size or index.is_meta):
            raise ValueError(f"{name} is a mask of shape {list(index.shape)}: give bool [{size}] that holds values.")
    if rows is not None or cols is not None:
        refuse_capture(weight.device, "compact, which reads its indices on the host", "call it before the capture")
    rows, cols = (_positions(index) for index in (rows, cols))
    for axis, (name, index) in enumerate((("rows holds", rows), ("cols holds", cols))):
        if index is not None:
            check_range(name, index, weight.shape[axis], "index")
    if not 1 <= pad_to < 2**31:
        raise ValueError(f"pad_to is {pad_to}: give a positive multiple, 1 for no padding.")
    return op.compact_op(weight.detach(), rows, cols, pad_to, backend)


def _positions(index: Tensor | None) -> Tensor | None:
    """The index, or that of what a mask keeps."""
    return index.nonzero().squeeze(1) if index is not None and index.dtype == torch.bool else index
