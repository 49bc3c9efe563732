"""The calibration windows that baselines choose by, and their loss: the ones that ATP's saliency reads."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.utils.data import default_collate

from atp.config import ATPConfig
from atp.data import PackedDataset
from atp.training.order import RunOrder


def calibration_batches(
    calibration: PackedDataset, config: ATPConfig, device: torch.device, *, count: int | None = None, size: int = 1
) -> Iterator[dict[str, Tensor]]:
    """`count` batches of `size` calibration windows, in the order in which ATP reads them with this seed.

    count None takes as many single windows as ATP's saliency: `decisions.saliency_windows`, each at most once.
    """
    if count is None:
        count = min(config.decisions.saliency_windows, len(calibration))
    rows = iter(RunOrder(len(calibration), count * size, config.seed + 1))
    for _ in range(count):
        batch = default_collate([calibration[next(rows)] for _ in range(size)])
        yield {name: value.to(device) for name, value in batch.items()}


def calibration_loss(model: nn.Module, batch: dict[str, Tensor], autocast: torch.dtype | None) -> Tensor:
    """Mean cross-entropy of a batch, scalar float32, with the model run in `autocast` if it is a dtype."""
    with torch.autocast(batch["input_ids"].device.type, dtype=autocast, enabled=autocast is not None):
        return model(**batch).loss


def first_tokens(calibration: PackedDataset, count: int) -> Tensor:
    """The first windows, int64 [count, length], on which a saved model is compared with the one in memory."""
    return torch.stack([calibration[i]["input_ids"] for i in range(min(count, len(calibration)))])
