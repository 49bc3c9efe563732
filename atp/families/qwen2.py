"""Qwen2 and Qwen2.5, the dense models."""

from __future__ import annotations

from transformers import PretrainedConfig, SeedOssConfig

from atp.families.family import Biases, Family, as_class


class Qwen2(Family):
    """Llama with a bias on q, k and v, none on o, and a sliding window on some layers."""

    layer_types = True

    def biases(self, config: PretrainedConfig) -> Biases:
        return Biases(qkv=True)

    def stock_config(self, config: PretrainedConfig) -> PretrainedConfig | None:
        # Serving engines' Qwen2 has no head_dim of its own; SeedOss is the same decoder with one, but does not slide.
        if config.sliding_window is not None:
            return None
        return as_class(config, SeedOssConfig, residual_dropout=0.0)
