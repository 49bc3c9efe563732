"""From samples to a batch: stacked tokens, and on the host everything a step must not ask the device for."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

IGNORE = -100


def collate(rows: Sequence[dict[str, Tensor]]) -> dict[str, Any]:
    """A batch of samples with `input_ids` and `labels` int64 [length].

    Returns input_ids and labels [batch, length], and where the loss lies: `scored` int64 [n], the positions in the
    flattened batch whose next token bears a label, and `targets` int64 [n], those labels.
    """
    input_ids, labels = (torch.stack([row[name] for row in rows]) for name in ("input_ids", "labels"))
    following = labels.numpy()[:, 1:]
    row, position = np.nonzero(following != IGNORE)
    return {
        "input_ids": input_ids,
        "labels": labels,
        "scored": torch.from_numpy(row * labels.shape[1] + position),
        "targets": torch.from_numpy(following[row, position]),
    }
