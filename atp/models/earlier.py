"""The config.json of a cut model as earlier versions wrote it: one class of ours for all families, with switches."""

from __future__ import annotations

from typing import Any

from atp.families import cut_type

_SWITCHES = {
    "attention_bias": ("llama", "qwen3", "smollm3", "granite", "seed_oss"),
    "attention_out_bias": ("seed_oss",),
    "mlp_bias": ("llama", "smollm3", "granite", "seed_oss"),
    "qk_norm": (),
    "sliding_window": ("mistral", "qwen2", "qwen3", "smollm3"),
    "layer_types": ("qwen2", "qwen3", "smollm3"),
    "no_rope_layers": ("smollm3",),
    "attention_multiplier": ("granite",),
    "residual_multiplier": ("granite",),
    "embedding_multiplier": ("granite",),
    "logits_scaling": ("granite",),
}
"""What that class knew beside Llama, and the families in which it means the same."""


def from_earlier(config: dict[str, Any]) -> dict[str, Any]:
    """The config of the same model as that of its family; one of now as it is.

    Those of today have no `family`. Before there was one, a sliding window told Mistral from Llama, and widths were
    `layer_shapes`.
    """
    if config.get("model_type") != cut_type("llama") or not {"family", "layer_shapes"} & config.keys():
        return config
    slides = config.get("sliding_window") is not None and "family" not in config
    family = config.get("family", "mistral" if slides else "llama")
    values = {key: value for key, value in config.items() if family in _SWITCHES.get(key, (family,))}
    if (shapes := values.pop("layer_shapes", None)) is not None:
        values["per_layer_config"] = dict(enumerate(shapes))
    del values["model_type"]
    values.pop("family", None)
    windowed = values.get("sliding_window") is not None
    return values | {"model_type": cut_type(family)} | ({"use_sliding_window": True} if windowed else {})
