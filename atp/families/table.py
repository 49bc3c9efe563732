"""The table of families: one row is one family."""

from __future__ import annotations

from transformers import PretrainedConfig

from atp.families.experts import ExpertFamily
from atp.families.family import Biases, Family, UnsupportedModel, family_name
from atp.families.refused import REASONS


def _like_llama(config: PretrainedConfig) -> str:
    # Llama's own class wants hidden_size to be a multiple of the number of heads, which a cut model's need not be.
    return "seed_oss" if config.attention_bias or config.mlp_bias else "mistral"


def _like_qwen2(config: PretrainedConfig) -> str | None:
    # Serving engines' Qwen2 has no head_dim of its own; Seed-OSS is the same decoder with one, but does not slide.
    return "seed_oss" if config.sliding_window is None else None


def _of_attention(config: PretrainedConfig) -> Biases:
    return Biases(qkv=config.attention_bias, o=config.attention_bias)


FAMILIES: dict[str, Family] = {
    family.name: family
    for family in (
        Family("llama", whole_heads=True, equal=_like_llama),  # also SmolLM and SmolLM2
        Family("mistral", biases=lambda config: Biases()),
        Family("qwen2", biases=lambda config: Biases(qkv=True), layer_types=True, equal=_like_qwen2),  # also Qwen2.5
        Family(
            "qwen3",
            biases=_of_attention,
            qk_norm=True,
            layer_types=True,
            inexact={"head_dim": "its RMSNorms over head_dim change when dimensions are removed, so use kv_group"},
        ),
        Family("smollm3", layer_types=True),
        Family("granite"),  # the dense models
        Family(
            "seed_oss", biases=lambda config: Biases(config.attention_bias, config.attention_out_bias, config.mlp_bias)
        ),
        ExpertFamily("mixtral", biases=lambda config: Biases()),
        ExpertFamily("qwen3_moe", biases=_of_attention, inner="moe_intermediate_size", qk_norm=True),
        ExpertFamily("olmoe", biases=_of_attention, norm_over_heads=True),
    )
}


def family_of(config: PretrainedConfig) -> Family:
    """The family of a transformers config, also of that of a cut model. Raises `UnsupportedModel` with the remedy."""
    name = family_name(config.model_type)
    if name not in FAMILIES:
        why = f" because {REASONS[name]}" if name in REASONS else ""
        raise UnsupportedModel(f"model family '{name}' is not supported{why}: use one of {', '.join(FAMILIES)}")
    return FAMILIES[name]
