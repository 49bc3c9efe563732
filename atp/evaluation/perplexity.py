"""Perplexity over packed windows."""

from __future__ import annotations

import math

import torch
from torch import nn
from torch.nn import functional as F

from atp.data.packing import IGNORE, PackedDataset
from atp.evaluation.inference import Progress, inference


def perplexity(
    model: nn.Module,
    dataset: PackedDataset,
    batch_size: int = 8,
    *,
    max_windows: int | None = None,
    autocast: torch.dtype | None = None,
    progress: Progress | None = None,
) -> dict[str, float]:
    """exp of the mean negative log-likelihood over all tokens that bear a label: {perplexity, nll (nats), tokens}.

    max_windows: score the first windows only. autocast: dtype to run the model in; the loss is float32 always.
    """
    windows = len(dataset) if max_windows is None else min(max_windows, len(dataset))
    nll, tokens = 0.0, 0
    with inference(model, autocast) as device:
        for start in range(0, windows, batch_size):
            batch = slice(start, min(start + batch_size, windows))
            logits = model(input_ids=dataset.input_ids[batch].to(device), use_cache=False).logits
            targets = dataset.labels[batch, 1:].to(device)
            # One row at a time: a float32 copy of one window's logits, never of the whole batch's.
            for row, target in zip(logits[:, :-1], targets, strict=True):
                nll += F.cross_entropy(row.float(), target, ignore_index=IGNORE, reduction="sum").item()
            tokens += int((targets != IGNORE).sum())
            if progress is not None:
                progress(batch.stop, windows)
    mean = nll / tokens
    return {"perplexity": math.exp(mean) if mean < 700 else math.inf, "nll": mean, "tokens": tokens}
