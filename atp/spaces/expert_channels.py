"""Mask space `expert_channels`: the channels of each expert, equally many of all experts of a layer."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import PretrainedConfig

from atp.families import EXPERTS, Channels, ExpertFamily, Linear, family_of
from atp.spaces.experts import require_experts
from atp.spaces.space import CUDA_WIDTHS, WIDTHS, Cut, Structure

_ALIGNED = 8
"""Grouped products of torch take rows of a multiple of 16 bytes, and so this many channels in 16 bits."""


def table(config: PretrainedConfig, linears: dict[str, Linear], norms: dict[str, int]) -> None:
    """Puts channels in the place of experts, in the tables of a layer; what no channel has stays beside the linears."""
    family = family_of(config)
    if isinstance(family, ExpertFamily):
        routed = family.routed(config)
        linears[EXPERTS] = family.channels(config)
        norms |= {EXPERTS: routed.experts * routed.end} if routed.end else {}


def structures(config: PretrainedConfig, linears: dict[str, Linear]) -> list[Structure]:
    """`expert_channels` removes a channel of one expert: its rows of gate and up, and its column of down.

    The weights of all experts are stacked, so a cut keeps equally many channels of each, but each has its own. A mask
    multiplies what the down projection reads. The router stays whole, so the choice of experts changes only as far as
    the layers before give something else. No linear of its own reads a channel, so no refit makes up for it.
    """
    require_experts(config, "expert_channels", linears)
    experts = linears[EXPERTS]
    assert isinstance(experts, Channels)
    owner = torch.arange(experts.out_features)
    family = family_of(config)
    assert isinstance(family, ExpertFamily)
    key = family.inner

    def widths(structure: Structure, kept: Tensor) -> dict[str, int]:
        return {key: int(kept.sum()) // structure.groups}

    return [
        Structure(
            "expert_channels", len(owner), (Cut(EXPERTS, 0, owner),), widths,
            multiples=tuple(width for width in WIDTHS if width > _ALIGNED), cuda_multiples=CUDA_WIDTHS,
            remainder=True, least=experts.experts, groups=experts.experts,
            unit=1 if experts.inner % _ALIGNED else _ALIGNED,
        )
    ]  # fmt: skip


def places(parameter: str, linear: Channels) -> tuple[int, Tensor] | None:
    """Where a stacked parameter of experts holds their channels: the axis, and on it int64 [inner, entries of one].

    parameter: its name in the experts. None for what no channel has a part of. Raises ValueError for an unknown name.
    """
    channel, transposed = torch.arange(linear.inner), linear.interleaved
    if parameter in ("gate_up_proj", "gate_up_proj_bias"):
        both = (2 * channel, 2 * channel + 1) if linear.interleaved else (channel, linear.inner + channel)
        return 2 if transposed and parameter == "gate_up_proj" else 1, torch.stack(both, 1)
    if parameter == "down_proj":
        return 1 if transposed else 2, channel[:, None]
    if parameter == "down_proj_bias":
        return None
    raise ValueError(f"experts have '{parameter}', and only their weights and biases can be cut: merge it first")
