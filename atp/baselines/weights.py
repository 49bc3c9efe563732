"""Shared by weight scores: the prunable linears, and sums over coupled groups."""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from atp.families import Channels, Linear
from atp.spaces.expert_channels import places
from atp.spaces.space import MaskSpace

LinearName = tuple[int, str]
"""Layer index, and name of a linear in it."""


def prunable_linears(model: PreTrainedModel, space: MaskSpace) -> dict[LinearName, nn.Linear]:
    """The linears of a plain causal LM that the space can cut."""
    return {
        (index, name): cast(nn.Linear, layer.get_submodule(name))
        for index, layer in enumerate(cast(nn.ModuleList, model.get_decoder().layers))
        for name in space.present(index)
    }


def weight_of(module: nn.Module, linear: Linear) -> Tensor:
    """The weight [outputs, inputs] of a linear or router; of stacked experts a row holds all of one, or of a channel.

    linear: how the space sees the module.
    """
    if isinstance(weight := getattr(module, "weight", None), Tensor):
        return weight.detach()
    stacked = {name: parameter.detach() for name, parameter in module.named_parameters()}
    if not isinstance(linear, Channels):
        return torch.cat([parameter.flatten(1) for parameter in stacked.values()], dim=1)
    parts = []
    for name, parameter in stacked.items():
        if (found := places(name, linear)) is not None:
            axis, own = found
            parts.append(parameter.movedim(axis, 1)[:, own].flatten(2).flatten(0, 1))
    return torch.cat(parts, dim=1)


def group_sums(
    space: MaskSpace, importance_of: Callable[[LinearName], Tensor], axes: tuple[int, ...] = (0, 1)
) -> Tensor:
    """Sums weight importance over the coupled group of each decision, float64 [space.size].

    importance_of: the importance [out_features, in_features] of a linear's weights. axes: cuts to include, on outputs
    (0), inputs (1) or both.
    """
    scores = torch.zeros(space.size, dtype=torch.float64)
    for structure in space.structures:
        for cut in structure.cuts if structure.size else ():
            if cut.axis in axes:
                by_line = importance_of((structure.layer, cut.module)).double().sum(1 - cut.axis)
                scores[structure.span].index_add_(0, cut.owner, by_line.cpu())
    return scores
