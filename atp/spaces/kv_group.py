"""Mask space `kv_group`: whole groups of attention heads, and MLP channels."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import PretrainedConfig

from atp.families import Linear, family_of
from atp.spaces.heads import kept_heads
from atp.spaces.mlp import mlp_channels
from atp.spaces.space import Cut, Structure


def structures(config: PretrainedConfig, linears: dict[str, Linear]) -> list[Structure]:
    """`kv_group` removes a key and value head with all query heads that read it.

    A soft mask multiplies queries, keys and values, so the inputs of o_proj arrive multiplied. Attention treats all
    heads alike, so whole heads may lie in any order: q_proj and o_proj in one, k_proj and v_proj in one.
    On CUDA an even number of groups is preferred: two heads of 64 dimensions fill a tile of its matrix products.
    Without a group the block adds nothing, and may go.
    """
    head_dim = family_of(config).head_dim(config)
    heads, kv_heads = (linears[f"self_attn.{name}_proj"].out_features // head_dim for name in "qk")
    of_kv = torch.arange(kv_heads).repeat_interleave(head_dim)
    shared = heads // max(kv_heads, 1)  # query heads of a group; a layer without attention has none
    of_query = torch.arange(kv_heads).repeat_interleave(shared * head_dim)
    cuts = (
        Cut("self_attn.q_proj", 0, of_query, reorderable=True),
        Cut("self_attn.k_proj", 0, of_kv, reorderable=True),
        Cut("self_attn.v_proj", 0, of_kv, reorderable=True),
        Cut("self_attn.o_proj", 1, of_query, soft=False, reorderable=True),
    )

    def widths(structure: Structure, kept: Tensor) -> dict[str, int]:
        whole = kept_heads(structure, kept, head_dim)
        groups = whole["self_attn.k_proj"]
        queries = groups.repeat_interleave(shared)
        if any(not torch.equal(found, groups if len(found) == kv_heads else queries) for found in whole.values()):
            raise ValueError(f"layer {structure.layer}: the attention linears keep different heads")
        return {"num_attention_heads": int(queries.sum()), "num_key_value_heads": int(groups.sum())}

    groups = Structure(
        "kv_group", kv_heads, cuts, widths, reader="self_attn.o_proj", cuda_multiples=(2,), block="self_attn"
    )
    return [groups, mlp_channels(linears, block="mlp")]
