"""Attention for training windows: block-diagonal over packed samples, without a host-device sync during a step.

transformers finds packed samples by reading the values of position_ids in every pass, which makes the host wait for the
device. It uses a 4-D mask as it is, so `training_mask` always makes one. For plain causal attention that mask has no
elements, and the attention registered here then calls the fused causal kernel.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from atp.families import Windows

NAME = "atp_sdpa"


def use_training_attention(model: PreTrainedModel) -> None:
    """Makes a causal LM accept what `training_masks` returns; in all other passes it computes transformers' sdpa."""
    model.config._attn_implementation = NAME


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


def _attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, None]:
    if attention_mask is not None and attention_mask.numel() == 0:
        attention_mask = None
    return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)


def register() -> None:
    """Registers the attention with transformers under its name; calling it again changes nothing."""
    AttentionInterface.register(NAME, _attention)
    AttentionMaskInterface.register(NAME, sdpa_mask)
