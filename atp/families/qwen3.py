"""Qwen3, the dense models."""

from __future__ import annotations

from transformers import PretrainedConfig, Qwen3Config

from atp.families.family import Biases, Family, as_class


class Qwen3(Family):
    """Llama with an RMSNorm on queries and keys, and a sliding window on some layers."""

    qk_norm = True
    layer_types = True
    inexact = {"head_dim": "its RMSNorms over head_dim change when dimensions are removed, so use kv_group"}

    def biases(self, config: PretrainedConfig) -> Biases:
        return Biases(qkv=config.attention_bias, o=config.attention_bias)

    def stock_config(self, config: PretrainedConfig) -> PretrainedConfig | None:
        return as_class(config, Qwen3Config, use_sliding_window=config.sliding_window is not None)
