"""Llama, with SmolLM and SmolLM2, and Mistral."""

from __future__ import annotations

from transformers import MistralConfig, PretrainedConfig, SeedOssConfig

from atp.families.family import Biases, Family, as_class


class Llama(Family):
    """The decoder that the other families vary."""

    whole_heads = True

    def stock_config(self, config: PretrainedConfig) -> PretrainedConfig | None:
        # Llama's own class wants hidden_size to be a multiple of the number of heads, which a cut model's need not be.
        if config.attention_bias or config.mlp_bias:
            return as_class(config, SeedOssConfig, residual_dropout=0.0)
        return as_class(config, MistralConfig)


class Mistral(Family):
    """Llama without biases; all layers may use a sliding window."""

    def biases(self, config: PretrainedConfig) -> Biases:
        return Biases()

    def sliding_window(self, config: PretrainedConfig) -> int | None:
        return config.sliding_window

    def stock_config(self, config: PretrainedConfig) -> PretrainedConfig | None:
        return as_class(config, MistralConfig)
