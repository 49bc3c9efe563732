"""What the scores of the baselines share: the prunable linears, calibration windows, and sums over coupled groups."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn
from torch.utils.data import default_collate

from atp.config import ATPConfig
from atp.data import PackedDataset
from atp.masks.space import MaskSpace
from atp.training.order import RunOrder

LinearName = tuple[int, str]
"""Layer, and name of a linear inside it."""


def prunable_linears(model: nn.Module, space: MaskSpace) -> dict[LinearName, nn.Linear]:
    """The linears of a plain causal LM that the space can cut."""
    return {
        (index, name): layer.get_submodule(name)
        for index, layer in enumerate(model.model.layers)
        for name in space.linears
    }


def group_sums(
    space: MaskSpace, importance_of: Callable[[LinearName], Tensor], axes: tuple[int, ...] = (0, 1)
) -> Tensor:
    """Sums an importance of every weight over the coupled group of each decision, float64 [space.size].

    importance_of: the importance [out_features, in_features] of a linear's weights. axes: which cuts count, those on
    outputs (0), on inputs (1) or both.
    """
    scores = torch.zeros(space.size, dtype=torch.float64)
    for structure in space.structures:
        for cut in structure.cuts:
            if cut.axis in axes:
                by_line = importance_of((structure.layer, cut.module)).double().sum(1 - cut.axis)
                scores[structure.span].index_add_(0, cut.owner, by_line.cpu())
    return scores


def calibration_batches(
    calibration: PackedDataset, config: ATPConfig, device: torch.device, *, count: int | None = None, size: int = 1
) -> Iterator[dict[str, Tensor]]:
    """`count` batches of `size` calibration windows, in the order in which ATP reads them with this seed.

    count None takes as many single windows as ATP's saliency: `decisions.saliency_windows`, each at most once.
    """
    if count is None:
        count = min(config.decisions.saliency_windows, len(calibration))
    order = RunOrder(len(calibration), count * size, config.seed + 1)
    rows = iter(order)
    for _ in range(count):
        batch = default_collate([calibration[next(rows)] for _ in range(size)])
        yield {name: value.to(device) for name, value in batch.items()}
