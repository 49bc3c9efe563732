"""Attention for training windows: block-diagonal over packed samples, without a host-device sync during a step.

transformers finds packed samples by reading the values of position_ids in every pass, which makes the host wait for the
device. It uses a 4-D mask as it is, so `training_mask` always makes one. For plain causal attention that mask has no
elements, and the attention registered here then calls the fused causal kernel. On CUDA queries and keys are rotated in
one kernel (`rotate`); on a CPU short windows take `short_attention`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import AttentionInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask
from transformers.models.gemma2.modeling_gemma2 import eager_attention_forward
from transformers.models.gpt_oss.modeling_gpt_oss import eager_attention_forward as sink_attention_forward
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from atp.families import Windows
from atp.models.short_attention import LONGEST, short_attention, suits
from atp_kernels import Projection, masked_lora_qkv, new_seed, rotary_embedding
from atp_kernels.packed import PackedLinears
from atp_kernels.packed.op import Norm, packed_attention, packed_linears

NAME = "atp_training"  # without the name of torch's kernel, with which transformers would refuse Gemma 2
FUSED_ON = ("cuda",)
"""The types of device where RoPE is one kernel each way, and q, k and v share what they do with their input.

Elsewhere both are transformers' own, to the last bit.
"""


GROUPED_ON = ("cpu",)
"""The types of device whose fused attention reads a key for all queries of its group under a mask too."""
UNGROUPED_ON = ("cuda",)
"""Those whose fused attention in float32 does so under no mask: grouped, it would hold the scores of whole windows."""


def use_training_attention(model: PreTrainedModel) -> None:
    """Makes a causal LM accept what `training_masks` returns; in all other passes it computes transformers' sdpa."""
    model.config._attn_implementation = NAME


@contextmanager
def fused_attention(model: nn.Module) -> Iterator[None]:
    """A causal LM under transformers' sdpa, plain or inside PEFT, takes the attention of this file in a with block."""
    config: Any = model.config
    before = config._attn_implementation
    if before == "sdpa":
        config._attn_implementation = NAME
    try:
        yield
    finally:
        config._attn_implementation = before


def training_mask(input_ids: Tensor, position_ids: Tensor | None, sliding_window: int | None) -> Tensor:
    """Who sees whom in windows of input_ids [batch, tokens]: bool [batch or 1, 1, tokens, tokens], or empty for causal.

    position_ids [batch, tokens] restart with every packed sample, and no sample sees another; None is one sample per
    row. sliding_window: how many tokens a token sees, itself included; None for all before it.
    """
    tokens = input_ids.shape[1]
    if sliding_window is not None and sliding_window >= tokens:
        sliding_window = None
    if position_ids is None and sliding_window is None:
        return input_ids.new_empty(1, 1, 0, 0)
    mask = input_ids.new_ones(tokens, tokens, dtype=torch.bool).tril()[None]
    if sliding_window is not None:
        mask = mask.triu(1 - sliding_window)
    if position_ids is not None:
        sample = (position_ids == 0).cumsum(-1)
        mask = mask & (sample[:, :, None] == sample[:, None, :])
    return mask[:, None]


def training_masks(input_ids: Tensor, position_ids: Tensor | None, windows: Windows) -> Tensor | dict[str, Tensor]:
    """The attention_mask of a pass: one `training_mask`, or one per layer type; windows: as `Family.windows` says."""
    if isinstance(windows, dict):
        return {kind: training_mask(input_ids, position_ids, window) for kind, window in windows.items()}
    return training_mask(input_ids, position_ids, windows)


def fuses(states: Tensor) -> bool:
    """Whether attention is fused on the device of these states. A compiler fuses transformers' own itself."""
    return states.device.type in FUSED_ON and not torch.compiler.is_compiling()


def packed_projections(attention: Any, states: Tensor) -> tuple[PackedLinears, list[Projection]] | None:
    """The pack of queries, keys and values, where a training step of these states may use it."""
    linears = attention.q_proj, attention.k_proj, attention.v_proj
    if not all(getattr(linear, "fusible", False) for linear in linears):
        return None
    found: tuple[PackedLinears, list[Projection]] | None = linears[0].packs.of(linears, states)
    return found


def attend_packed(
    attention: Any,
    states: Tensor,
    angles: tuple[Tensor, Tensor],
    attention_mask: Tensor | None,
    norm: Norm | None = None,
) -> Tensor | None:
    """All of an attention without a cache in a training step that `packed_attention` takes; None in others.

    Arguments as those of its forward: states [batch, tokens, inputs], angles cos and sin, a mask of `training_mask`.
    norm: states are the residual stream, to which the attention of what this makes of them is added.
    """
    heads = getattr(attention, "head_dim", None), getattr(attention, "v_head_dim", attention.head_dim)
    plain = heads == (angles[0].shape[-1],) * 2 and not hasattr(attention, "q_norm") and states.dim() == 3
    if not plain or getattr(attention, "rope_index", None) is not None or not 1 < states.shape[1] <= LONGEST:
        return None
    if getattr(attention, "attn_logit_softcapping", None) is not None:
        return None
    if attention.config._attn_implementation != NAME or (attention.training and attention.attention_dropout):
        return None
    if attention_mask is not None and attention_mask.numel() == 0:
        attention_mask = None
    if attention_mask is not None and (attention_mask.dtype != torch.bool or attention_mask.dim() != 4):
        return None
    end, first = attention.o_proj, packed_projections(attention, states)
    last = end.packs.of((end,), states) if first is not None and getattr(end, "fusible", False) else None
    if first is None or last is None or (norm is not None and end.observed[0] is not None):
        return None
    sums = [linear.observed[0] for linear in (attention.q_proj, attention.k_proj, attention.v_proj)]
    watched = [part[: len(states)] for part in sums if part is not None]
    if watched and (len(watched) < len(sums) or len(watched[0]) < len(states)):
        return None
    given = [*first[1], *last[1]]
    options = (angles, attention_mask, attention.scaling, watched or None, norm)
    y = packed_attention(states, first[0], last[0], given, *options)
    seen: Tensor = end.seen(y)
    return seen


def project(attention: Any, states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values of states [batch, tokens, inputs], each [batch, tokens, outputs].

    Where all three linears are masked LoRA layers that a block may take apart, under slices or no mask at all and with
    one probability of dropout, they are one call, in which they share the products that the adapters make with the
    states, and the draw of what these drop.
    """
    q, k, v = linears = attention.q_proj, attention.k_proj, attention.v_proj
    packed = packed_projections(attention, states)
    if packed is not None:
        found = packed_linears(states, *packed).split(packed[0].sizes, -1)
        q_out, k_out, v_out = (linear.seen(y) for linear, y in zip(linears, found, strict=True))
        # Attention keeps values, and would keep the queries and keys beside them too.
        return q_out, k_out, v_out.contiguous()
    fusible = fuses(states) and all(getattr(linear, "fusible", False) for linear in linears)
    if fusible and q.dropout == k.dropout == v.dropout:
        slices = tuple(linear.kept for linear in linears)
        masks = [mask for linear in linears for mask in (linear.out_mask, linear.in_mask)]
        kept = slices if all(slice_ is not None for slice_ in slices) else None
        if kept is not None or all(part is None for part in (*slices, *masks)):
            p = q.dropout
            drawn = {"dropout": p, "seed": new_seed(states) if p else None}
            found = masked_lora_qkv(states, q.projection, k.projection, v.projection, kept=kept, **drawn)
            q_out, k_out, v_out = (linear.seen(y) for linear, y in zip(linears, found, strict=True))
            return q_out, k_out, v_out
    return q(states), k(states), v(states)


def rotate(
    query: Tensor,
    key: Tensor,
    angles: tuple[Tensor, Tensor],
    index: Tensor | None = None,
    width: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Queries and keys [batch, tokens, heads, dim] with RoPE, as [batch, heads, tokens, dim].

    angles: cos and sin [batch or 1, tokens, positions]; index [dim]: the positions of the kept pairs, None for all, of
    which fewer than dim rotate the first dimensions alone.
    width: where RoPE is one kernel, it fills heads with zeros up to this.
    """
    cos, sin = angles
    if index is None and (part := cos.shape[-1]) < query.shape[-1]:
        return _rotate_part(query.transpose(1, 2), key.transpose(1, 2), angles, part)
    if fuses(query):
        return rotary_embedding(query, key, cos, sin, index=index, width=width)
    if index is not None:
        cos, sin = cos.index_select(-1, index), sin.index_select(-1, index)
    rotated: tuple[Tensor, Tensor] = apply_rotary_pos_emb(query.transpose(1, 2), key.transpose(1, 2), cos, sin)
    return rotated


def _rotate_part(query: Tensor, key: Tensor, angles: tuple[Tensor, Tensor], part: int) -> tuple[Tensor, Tensor]:
    """Heads [batch, heads, tokens, dim] with RoPE on their first dimensions."""
    rotated = apply_rotary_pos_emb(query[..., :part], key[..., :part], *angles)
    query, key = (torch.cat([new, old[..., part:]], -1) for new, old in zip(rotated, (query, key), strict=True))
    return query, key


def _attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, None]:
    if attention_mask is not None and attention_mask.numel() == 0:
        attention_mask = None
    dropout, scaling = kwargs.get("dropout", 0.0), kwargs.get("scaling")
    if kwargs.get("softcap") is not None:
        return _eagerly(eager_attention_forward, module, query, key, value, attention_mask, **kwargs), None
    if kwargs.get("s_aux") is not None:
        return _eagerly(sink_attention_forward, module, query, key, value, attention_mask, **kwargs), None
    if scaling is not None and not dropout and suits(query, key, value, attention_mask):
        output = short_attention(query, key, value, attention_mask, scaling)
    elif attention_mask is not None and query.device.type in GROUPED_ON and 1 < query.shape[2] == key.shape[2]:
        # The CPU's kernel takes a mask and groups of queries at once. transformers copies each key and value for every
        # query of its group, as CUDA's fused kernels need it.
        output = functional.scaled_dot_product_attention(
            query, key, value, attention_mask, dropout_p=dropout, scale=scaling, enable_gqa=True
        )
    else:
        if (
            attention_mask is None and query.device.type in UNGROUPED_ON and query.dtype == torch.float32
            and 1 < query.shape[2] == key.shape[2] and key.shape[1] < query.shape[1]
        ):  # fmt: skip
            key, value = (repeat_kv(part, query.shape[1] // part.shape[1]) for part in (key, value))
            ungrouped: Any = SimpleNamespace(is_causal=getattr(module, "is_causal", True))  # all that is read of it
            module = ungrouped
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    return output.transpose(1, 2).contiguous(), None


def _eagerly(
    attend: Any, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **kwargs: Any
) -> Tensor:
    """Attention with a soft cap on its scores or with sinks, which no fused kernel of torch has.

    attend: transformers' function for it. mask: bool, None for causal.
    """
    tokens, seen = query.shape[2], key.shape[2]
    if mask is None:
        mask = query.new_ones(tokens, seen, dtype=torch.bool).tril(seen - tokens)
    added = query.new_zeros(mask.shape).masked_fill_(~mask, torch.finfo(query.dtype).min)
    # What the attention reads of its module may differ between the layers of a cut model, and is told by the shapes.
    groups: Any = SimpleNamespace(
        num_key_value_groups=query.shape[1] // key.shape[1], training=module.training, sinks=kwargs.get("s_aux")
    )
    output: Tensor = attend(groups, query, key, value, added, **kwargs)[0]
    return output


def register() -> None:
    """Registers the attention with transformers under its name; calling it again changes nothing."""
    AttentionInterface.register(NAME, _attention)
    AttentionMaskInterface.register(NAME, sdpa_mask)


register()
