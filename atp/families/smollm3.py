"""SmolLM3."""

from atp.families.family import Family


class SmolLM3(Family):
    """Llama without RoPE on some layers, as config.no_rope_layers says, and with a sliding window on some."""

    layer_types = True
