"""LLM-Pruner (Ma, Fang, Wang 2023, arXiv 2305.11627): Taylor importance of coupled groups, block-wise.

The choice alone; tuning is the common one. Groups are whole KV groups and MLP channels (mask space `kv_group`), the
importance of a group is the sum over its weights, and every layer but the protected ones loses the same share.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

import torch
from torch import Tensor
from torch.utils.data import Dataset
from transformers import PreTrainedModel

from atp.baselines.calibration import Batch, calibration_batches, calibration_loss
from atp.baselines.uniform import uniform_mask
from atp.baselines.weights import LinearName, group_sums, prunable_linears
from atp.config import ATPConfig
from atp.decide.budget import Budget
from atp.inputs.precision import autocast_dtype
from atp.spaces.space import MaskSpace

Order = Literal["first", "second", "mixed"]
_PROTECTED_FIRST, _PROTECTED_LAST, _DEPTH = 4, 2, 32  # the paper's layers of LLaMA-7B


def taylor_mask(
    model: PreTrainedModel, space: MaskSpace, calibration: Dataset, config: ATPConfig, order: Order = "first"
) -> Tensor:
    """Keeps the most important groups of every layer that is not protected; bool [space.size]."""
    device = next(model.parameters()).device
    scores = taylor_scores(
        model, space, calibration_batches(calibration, config, device), order,
        autocast=autocast_dtype(config.training.precision),
    )  # fmt: skip
    decisions = config.decisions
    free = unprotected_layers(space.num_layers)
    return uniform_mask(scores, decisions.target_keep, Budget(space), decisions.multiples, free)


def taylor_scores(
    model: PreTrainedModel,
    space: MaskSpace,
    batches: Iterable[Batch],
    order: Order,
    *,
    autocast: torch.dtype | None = None,
) -> Tensor:
    """Importance of every group, float64 [space.size] (equation 5 and section 3.2 of the paper).

    With g the gradient of the mean loss over the batches and F the mean of their squared gradients (the Fisher
    diagonal when each batch is one sample), a weight w counts |w g| (first), |w^2 F| (second) or |w g - w^2 F / 2|
    (mixed). Needs memory for two copies of the prunable weights.
    """
    linears = prunable_linears(model, space)
    weights = {name: linear.weight.requires_grad_(True) for name, linear in linears.items()}
    mean, square = _gradient_moments(model, weights, batches, autocast)

    def importance(name: LinearName) -> Tensor:
        w = weights[name].detach()
        if order == "first":
            return (w * mean[name]).abs()
        curvature = w.square() * square[name]
        return curvature.abs() if order == "second" else (w * mean[name] - curvature / 2).abs()

    return group_sums(space, importance)


def unprotected_layers(depth: int) -> range:
    """The layers that may be pruned: all but the first 4 and last 2 of 32, scaled to another depth."""
    return range(round(_PROTECTED_FIRST * depth / _DEPTH), depth - round(_PROTECTED_LAST * depth / _DEPTH))


def _gradient_moments(
    model: PreTrainedModel,
    weights: dict[LinearName, Tensor],
    batches: Iterable[Batch],
    autocast: torch.dtype | None,
) -> tuple[dict[LinearName, Tensor], dict[LinearName, Tensor]]:
    """Mean and mean square over batches of dL/dw."""
    mean = {name: torch.zeros_like(weight) for name, weight in weights.items()}
    square = {name: torch.zeros_like(weight) for name, weight in weights.items()}
    count = 0
    for batch in batches:
        loss = calibration_loss(model, batch, autocast)
        for name, gradient in zip(weights, torch.autograd.grad(loss, list(weights.values())), strict=True):
            mean[name] += gradient
            square[name] += gradient.square()
        count += 1
    for moments in (mean, square):
        for moment in moments.values():
            moment /= count
    return mean, square
