"""Parameters and bytes before and after the cut, counted on models without memory."""

from __future__ import annotations

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PretrainedConfig

PARTS = ("embedding", "attention", "mlp", "norms", "head")
"""What parameters are counted by. A head that shares the embedding's weights has none of its own."""


def parameters_of(config: PretrainedConfig) -> dict[str, int]:
    """The parameters of the causal LM that a config describes, by part, and their `total`.

    The model is the one that transformers builds, on the meta device, so the count is exact and takes no memory.
    """
    with torch.device("meta"):
        model: nn.Module = AutoModelForCausalLM.from_config(config)
    return counted(model)


def counted(model: nn.Module) -> dict[str, int]:
    """The parameters of a causal LM by part, and their `total`; shared ones count once."""
    counts = dict.fromkeys(PARTS, 0)
    for name, parameter in model.named_parameters():
        counts[_part(name)] += parameter.numel()
    return counts | {"total": sum(counts.values())}


def _part(name: str) -> str:
    if "norm" in name:
        return "norms"
    for mark, part in (("embed_tokens", "embedding"), ("self_attn", "attention"), ("mlp", "mlp")):
        if mark in name:
            return part
    return "head"
