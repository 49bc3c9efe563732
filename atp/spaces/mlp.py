"""Mask space `mlp`: the channels of the MLP alone, which every other space removes in the same way."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import PretrainedConfig

from atp.families import Linear
from atp.spaces.space import CUDA_WIDTHS, WIDTHS, Cut, Structure


def structures(config: PretrainedConfig, linears: dict[str, Linear]) -> list[Structure]:
    """`mlp` alone: attention stays whole, which keeps the cut exact where norms are over all heads."""
    return [mlp_channels(linears, block="mlp")]


def mlp_channels(linears: dict[str, Linear], block: str | None = None) -> Structure:
    """Structure `mlp`: a decision removes one channel, a row of gate_proj and up_proj and a column of down_proj.

    A soft mask multiplies gate and up, so the inputs of down_proj arrive multiplied. Without a gate it multiplies these
    inputs, because an activation alone does not pass a factor on. Only element-wise work lies between the linears, so
    channels may lie in any order. block: `mlp` where it may go as a whole; without a channel it adds nothing.
    """
    *producers, reader = mlp_linears(linears)
    size, gated = linears[reader].in_features, len(producers) > 1
    owner = torch.arange(size)
    cuts = (
        *(Cut(name, 0, owner, soft=gated, reorderable=True) for name in producers),
        Cut(reader, 1, owner, soft=not gated, reorderable=True),
    )
    return Structure(
        "mlp", size, cuts, _widths, reader=reader, multiples=WIDTHS, cuda_multiples=CUDA_WIDTHS,
        remainder=True, block=block,
    )  # fmt: skip


def mlp_linears(linears: dict[str, Linear]) -> list[str]:
    """The names of the MLP's linears, of which the last ends the block."""
    return [name for name in linears if name.startswith("mlp.")]


def _widths(structure: Structure, kept: Tensor) -> dict[str, int]:
    return {"intermediate_size": int(kept.sum())}
