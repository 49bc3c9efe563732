"""SmolLM3."""

from __future__ import annotations

from transformers import PretrainedConfig, SmolLM3Config

from atp.families.family import Family, as_class


class SmolLM3(Family):
    """Llama without RoPE on some layers, as config.no_rope_layers says, and with a sliding window on some."""

    layer_types = True

    def stock_config(self, config: PretrainedConfig) -> PretrainedConfig | None:
        return as_class(config, SmolLM3Config, use_sliding_window=config.sliding_window is not None)
