"""What a cut leaves of attention heads: a layer of the cut model has whole heads, all of one width."""

from __future__ import annotations

import torch
from torch import Tensor

from atp.spaces.space import Structure


def kept_dims(structure: Structure, kept: Tensor, head_dim: int) -> Tensor:
    """The dimensions that every head keeps, bool [head_dim], for decisions that act on all heads alike.

    kept: bool [structure.size]. Raises ValueError when heads keep different dimensions.
    """
    shared: Tensor | None = None
    for cut in structure.cuts:
        by_head = kept[cut.owner].view(-1, head_dim)
        shared = by_head[0] if shared is None else shared
        if not torch.equal(by_head, shared.expand_as(by_head)):
            raise ValueError(
                f"layer {structure.layer}: the heads of {cut.module} keep different dimensions, which no model can hold"
            )
    assert shared is not None
    return shared


def kept_heads(structure: Structure, kept: Tensor, head_dim: int) -> dict[str, Tensor]:
    """For each linear of the structure the heads that it keeps, bool [heads], for decisions that act on whole heads.

    kept: bool [structure.size]. Raises ValueError when a head keeps a part of its dimensions.
    """
    heads = {}
    for cut in structure.cuts:
        by_head = kept[cut.owner].view(-1, head_dim)
        heads[cut.module] = by_head[:, 0]
        if not torch.equal(by_head, by_head[:, :1].expand_as(by_head)):
            raise ValueError(f"layer {structure.layer}: a head of {cut.module} keeps a part of its dimensions")
    return heads
