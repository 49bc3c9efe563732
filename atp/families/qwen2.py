"""Qwen2 and Qwen2.5, the dense models."""

from __future__ import annotations

from transformers import PretrainedConfig

from atp.families.family import Biases, Family


class Qwen2(Family):
    """Llama with a bias on q, k and v, none on o, and a sliding window on some layers."""

    layer_types = True

    def biases(self, config: PretrainedConfig) -> Biases:
        return Biases(qkv=True)
