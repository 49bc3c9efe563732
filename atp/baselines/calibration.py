"""The calibration samples of baselines, which are those of ATP's saliency, and their loss."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from atp.config import ATPConfig
from atp.data import collate
from atp.training.data import run_order
from atp.training.loss import causal_lm_loss

Batch = dict[str, Any]
"""A result of `atp.data.collate`."""


def calibration_batches(
    calibration: Dataset, config: ATPConfig, device: torch.device, *, count: int | None = None, size: int = 1
) -> Iterator[Batch]:
    """`count` batches of `size` calibration samples, in ATP's order for this seed.

    count None: as many as ATP's saliency reads, `decisions.saliency_windows`, each sample at most once.
    """
    if count is None:
        count = min(config.decisions.saliency_windows, len(calibration))  # type: ignore[arg-type]  # ours all have a length
    order = run_order(calibration, size, 0, config.seed + 1)
    for index in range(count):
        batch = collate([calibration[row] for row in order.at(index * size, size)])
        yield {name: value.to(device) if isinstance(value, Tensor) else value for name, value in batch.items()}


def calibration_loss(model: nn.Module, batch: Batch, autocast: torch.dtype | None) -> Tensor:
    """Mean cross-entropy of a batch, scalar float32. autocast: dtype to run the model in, or None."""
    with torch.autocast(batch["input_ids"].device.type, dtype=autocast, enabled=autocast is not None):
        return causal_lm_loss(model, batch)
