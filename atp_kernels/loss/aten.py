"""Cross-entropy in ATen calls, on a CPU for a few rows at a time."""

import torch
from torch import Tensor

from atp_kernels.call import CACHED_ELEMENTS, Call
from atp_kernels.loss import definition


def supports(call: Call) -> str | None:
    """Every call."""
    return None


def cross_entropy_(logits: Tensor, targets: Tensor) -> Tensor:
    """The definition, on a CPU in blocks of rows: fresh memory for all of them costs more than the softmax does."""
    rows, vocab = logits.shape
    step = max(1, CACHED_ELEMENTS // vocab) if logits.device.type == "cpu" else max(1, rows)
    blocks = zip(logits.split(step), targets.split(step), strict=True)
    return torch.cat([definition.cross_entropy_(some, indices) for some, indices in blocks])
