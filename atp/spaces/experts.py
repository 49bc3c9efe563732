"""Mask space `experts`: whole experts of a layer, with their rows of the router."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import PretrainedConfig

from atp.families import EXPERTS, Linear, UnsupportedModel, family_of
from atp.spaces.space import Cut, Structure


def structures(config: PretrainedConfig, linears: dict[str, Linear]) -> list[Structure]:
    """`experts` removes an expert: its row of the router and its weights.

    A soft mask multiplies what an expert adds, which is known where the router weighs it; an expert at 0 is out of the
    router's choice, and its tokens go to others. As many stay as a token takes. Nothing reads a structure: the weights
    that end the block go with their expert, so no refit can make up for it.
    """
    require_experts(config, "experts", linears)
    found: Any = config
    router = next(name for name, linear in linears.items() if not linear.lora and name != EXPERTS)
    owner = torch.arange(linears[EXPERTS].out_features)
    cuts = (Cut(router, 0, owner), Cut(EXPERTS, 0, owner, soft=False))
    key = found.attribute_map.get("num_experts", "num_experts")

    def widths(structure: Structure, kept: Tensor) -> dict[str, int]:
        return {key: int(kept.sum())}

    return [Structure("experts", len(owner), cuts, widths, remainder=True, least=found.num_experts_per_tok)]


def require_experts(config: PretrainedConfig, space: str, linears: dict[str, Linear]) -> None:
    """Raises `UnsupportedModel` for a family without experts."""
    if EXPERTS not in linears:
        family = family_of(config)
        raise UnsupportedModel(
            f"space '{space}' does not fit model family '{family.name}': it has no experts, so use {family.space}"
        )
