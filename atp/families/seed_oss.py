"""Seed-OSS, the class in which cut models of Llama with biases and of Qwen2 are written."""

from __future__ import annotations

from transformers import PretrainedConfig, SeedOssConfig

from atp.families.family import Biases, Family, as_class


class SeedOss(Family):
    """Llama with a bias on o_proj of its own; its residual dropout, which it has in training alone, is left out."""

    def biases(self, config: PretrainedConfig) -> Biases:
        return Biases(qkv=config.attention_bias, o=config.attention_out_bias, mlp=config.mlp_bias)

    def stock_config(self, config: PretrainedConfig) -> PretrainedConfig | None:
        return as_class(config, SeedOssConfig, residual_dropout=0.0)
