"""Mask space `head_dim`, the paper's: dimensions of every head, and MLP channels (arXiv 2412.14426)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import PretrainedConfig

from atp.families import Linear
from atp.spaces.heads import kept_dims
from atp.spaces.mlp import mlp_channels
from atp.spaces.space import Cut, Structure


def structures(config: PretrainedConfig, linears: dict[str, Linear]) -> list[Structure]:
    """`qk` removes a RoPE pair of every query and key head, `vo` a dimension of every value head.

    RoPE rotates dimension i together with i + head_dim / 2, so a qk decision covers both. A soft mask multiplies the
    values; attention takes weighted means of them, so the inputs of o_proj arrive multiplied. No side may be reordered:
    a side lists head after head, and kept-first order would mix dimensions of different heads.
    """
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    head_dim = linears["self_attn.v_proj"].out_features // kv_heads
    dim = torch.arange(head_dim)
    pair = dim % (head_dim // 2)
    qk = (Cut("self_attn.q_proj", 0, pair.repeat(heads)), Cut("self_attn.k_proj", 0, pair.repeat(kv_heads)))
    vo = (Cut("self_attn.v_proj", 0, dim.repeat(kv_heads)),
          Cut("self_attn.o_proj", 1, dim.repeat(heads), soft=False))  # fmt: skip

    def qk_widths(structure: Structure, kept: Tensor) -> dict[str, Any]:
        pairs, partners = kept_dims(structure, kept, head_dim).chunk(2)
        if not torch.equal(pairs, partners):
            raise ValueError(f"layer {structure.layer}: the heads keep one half of a RoPE pair without the other")
        return {"qk_pairs": None if bool(pairs.all()) else pairs.nonzero().flatten().tolist()}

    def vo_widths(structure: Structure, kept: Tensor) -> dict[str, Any]:
        dims = kept_dims(structure, kept, head_dim)
        return {"v_head_dim": None if bool(dims.all()) else int(dims.sum())}

    return [
        Structure("qk", head_dim // 2, qk, qk_widths),
        Structure("vo", head_dim, vo, vo_widths, reader="self_attn.o_proj"),
        mlp_channels(linears),
    ]
