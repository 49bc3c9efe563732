"""From samples to a batch: stacked tokens, and host-side indices that spare a step host-device syncs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

IGNORE = -100
_LOOKED_AT = 100  # samples, for their average


def collate(rows: Sequence[dict[str, Tensor]]) -> dict[str, Any]:
    """A batch of samples with `input_ids` and `labels` int64 [length], and `position_ids` if several share a row.

    Returns these as [batch, longest]; `scored` int64 [n], positions in the flattened batch whose next token has a
    label; `targets` int64 [n], those labels; `tokens`, the number of tokens without padding. Shorter rows are padded
    on the right, which causal attention never sees.
    """
    fill = {"input_ids": 0, "labels": IGNORE, "position_ids": 0}
    batch: dict[str, Any] = {
        name: pad_sequence([row[name] for row in rows], batch_first=True, padding_value=fill[name])
        for name in fill.keys() & rows[0].keys()
    }
    following = batch["labels"].numpy()[:, 1:]
    row, position = np.nonzero(following != IGNORE)
    batch["scored"] = torch.from_numpy(row * batch["labels"].shape[1] + position)
    batch["targets"] = torch.from_numpy(following[row, position])
    batch["tokens"] = sum(len(row["input_ids"]) for row in rows)
    return batch


def scored_tokens(labels: Tensor) -> int:
    """Tokens of a sample that have a loss: the first is predicted from nothing. labels: int64 [length]."""
    return int((labels[1:] != IGNORE).sum())


def scored_per_sample(dataset: Any) -> float:
    """Tokens with a loss in an average sample, by 100 of them, evenly spaced. dataset: as `collate` takes its rows."""
    looked_at = range(0, len(dataset), max(len(dataset) // _LOOKED_AT, 1))
    return sum(scored_tokens(dataset[row]["labels"]) for row in looked_at) / max(len(looked_at), 1)
