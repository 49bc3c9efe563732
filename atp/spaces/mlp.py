"""Mask space `mlp`: the channels of a gated MLP alone, which every other space removes in the same way."""

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

    A soft mask multiplies gate and up, so the inputs of down_proj arrive multiplied. Only element-wise work lies
    between the three linears, so channels may lie in any order. block: `mlp` where it may go as a whole; without a
    channel it adds nothing.
    """
    size = linears["mlp.down_proj"].in_features
    owner = torch.arange(size)
    cuts = (
        Cut("mlp.gate_proj", 0, owner, reorderable=True),
        Cut("mlp.up_proj", 0, owner, reorderable=True),
        Cut("mlp.down_proj", 1, owner, soft=False, reorderable=True),
    )
    return Structure(
        "mlp", size, cuts, _widths, reader="mlp.down_proj", multiples=WIDTHS, cuda_multiples=CUDA_WIDTHS,
        remainder=True, block=block,
    )  # fmt: skip


def _widths(structure: Structure, kept: Tensor) -> dict[str, int]:
    return {"intermediate_size": int(kept.sum())}
