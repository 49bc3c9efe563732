"""Granite, the dense models."""

from __future__ import annotations

from transformers import GraniteConfig, PretrainedConfig

from atp.families.family import Family, as_class


class Granite(Family):
    """Llama with multipliers of embeddings, attention scores and what a block adds, and a divisor of the logits."""

    def logits_divisor(self, config: PretrainedConfig) -> float:
        return float(config.logits_scaling)

    def stock_config(self, config: PretrainedConfig) -> PretrainedConfig | None:
        return as_class(config, GraniteConfig)
