"""Llama, with SmolLM and SmolLM2, and Mistral."""

from __future__ import annotations

from transformers import PretrainedConfig

from atp.families.family import Biases, Family


class Llama(Family):
    """The decoder that the other families vary."""

    whole_heads = True


class Mistral(Family):
    """Llama without biases; all layers may use a sliding window."""

    def biases(self, config: PretrainedConfig) -> Biases:
        return Biases()

    def sliding_window(self, config: PretrainedConfig) -> int | None:
        return config.sliding_window
