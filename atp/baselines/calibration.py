"""The samples that baselines choose by, which are those of ATP's saliency, and their loss."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset, Subset

from atp.config import ATPConfig
from atp.data import collate
from atp.processes import processes
from atp.training.data import run_order, sized
from atp.training.loss import causal_lm_loss

Batch = dict[str, Any]
"""A result of `atp.data.collate`."""


def choice_samples(train: Dataset, calibration: Dataset, config: ATPConfig) -> Dataset:
    """The samples that a choice is made by: those of ATP's own decisions, so that a comparison is like with like.

    Where ATP's saliency runs over the open steps, each training sample that they read; else the calibration samples,
    of which `calibration_batches` takes `decisions.saliency_windows`.
    """
    if config.decisions.source != "running":
        return calibration
    training = config.training
    rows = run_order(train, training.batch_size, 0, config.seed).at(0, training.opened_samples * processes.count())
    return Subset(train, list(dict.fromkeys(rows)))


def calibration_batches(
    samples: Dataset, config: ATPConfig, device: torch.device, *, count: int | None = None, size: int = 1
) -> Iterator[Batch]:
    """`count` batches of `size` samples, in an order by the seed.

    count None: all that `choice_samples` has taken from the training samples, else as many calibration samples as ATP's
    saliency reads, `decisions.saliency_windows`; each at most once.
    """
    if count is None:
        running = config.decisions.source == "running"
        count = sized(samples) if running else min(config.decisions.saliency_windows, sized(samples))
    order = run_order(samples, size, 0, config.seed + 1)
    for index in range(count):
        batch = collate([samples[row] for row in order.at(index * size, size)])
        yield {name: value.to(device) if isinstance(value, Tensor) else value for name, value in batch.items()}


def calibration_loss(model: nn.Module, batch: Batch, autocast: torch.dtype | None) -> Tensor:
    """Mean cross-entropy of a batch, scalar float32. autocast: dtype to run the model in, or None."""
    with torch.autocast(batch["input_ids"].device.type, dtype=autocast, enabled=autocast is not None):
        return causal_lm_loss(model, batch)
