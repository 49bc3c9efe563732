"""The table of families: one row is one family."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from transformers import PretrainedConfig

from atp.families.experts import ExpertFamily
from atp.families.family import Biases, Block, Family, UnsupportedModel, declared, family_name
from atp.families.refused import REASONS


def _like_llama(config: PretrainedConfig) -> str:
    # Llama's own class wants hidden_size to be a multiple of the number of heads, which a cut model's need not be.
    return "seed_oss" if config.attention_bias or config.mlp_bias else "mistral"


def _like_qwen2(config: PretrainedConfig) -> str | None:
    # Serving engines' Qwen2 has no head_dim of its own; Seed-OSS is the same decoder with one, but does not slide.
    return "seed_oss" if config.sliding_window is None else None


def _own_if_heads_divide(name: str) -> Callable[[PretrainedConfig], str | None]:
    """The family's own class, which wants hidden_size to be a multiple of the number of heads."""
    return lambda config: None if config.hidden_size % config.num_attention_heads else name


def _like_phi3(config: PretrainedConfig) -> str | None:
    # Phi-3's own class counts the factors of longrope by hidden_size and heads. Mistral is the same decoder without
    # fused projections, and its RoPE rotates whole heads.
    widths = config.num_attention_heads * config.head_dim, config.hidden_size
    if widths[0] == widths[1] or config.rope_parameters["rope_type"] == "default":
        return "phi3"
    return "mistral" if config.rope_parameters["partial_rotary_factor"] == 1 else None


def _gemma_limit(config: PretrainedConfig) -> str | None:
    if declared(config, "use_bidirectional_attention", None):
        return "its tokens see those behind them (use_bidirectional_attention), and losses here are of the next token"
    if family_name(config.model_type) == "gemma3_text" and config.attn_logit_softcapping is not None:
        return "attn_logit_softcapping is set, which transformers' class leaves out: make it null in config.json"
    return None


def _of_attention(config: PretrainedConfig) -> Biases:
    return Biases(qkv=config.attention_bias, o=config.attention_bias)


_AROUND = (
    Block("self_attn", "input_layernorm", "post_attention_layernorm"),
    Block("mlp", "pre_feedforward_layernorm", "post_feedforward_layernorm"),
)
_NORMS_OF_HEADS = "its RMSNorms over head_dim change when dimensions are removed, so use kv_group"
_READ_WHOLE = "an RMSNorm reads all that a block gives: use kv_group"
_BEHIND = (
    Block("self_attn", None, "post_attention_layernorm"),
    Block("mlp", None, "post_feedforward_layernorm"),
)
_NORM_OF_ALL_HEADS = "its RMSNorms of queries and keys are over all heads, and change when some go: use mlp"
_OLMO: dict[str, Any] = {
    "biases": _of_attention,
    "qk_norm": True, "norms_all_heads": True, "own_attention": True, "blocks": _BEHIND, "space": "mlp",
    "inexact": {
        "kv_group": _NORM_OF_ALL_HEADS, "head_dim": _NORM_OF_ALL_HEADS,
        "disp": "an RMSNorm reads all that a block gives: use mlp",
    },
}  # fmt: skip
_GEMMA: dict[str, Any] = {
    "biases": _of_attention,
    "layer_types": True, "whole_heads": True, "blocks": _AROUND, "unit_offset": True, "limit": _gemma_limit,
}  # fmt: skip
_UNGATED = ("mlp.up_proj", "mlp.down_proj")
_GATE_UP: dict[str, tuple[str, ...]] = {"mlp.gate_up_proj": ("mlp.gate_proj", "mlp.up_proj")}
_QKV: dict[str, tuple[str, ...]] = {"self_attn.qkv_proj": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")}
_NEIGHBOURS = "its RoPE rotates neighbours, which the space does not pair: use kv_group"
_GLM: dict[str, Any] = {
    "biases": lambda config: Biases(qkv=config.attention_bias),
    "own_attention": True, "fused": _GATE_UP, "partial": True, "neighbours": True,
}  # fmt: skip

FAMILIES: dict[str, Family] = {
    family.name: family
    for family in (
        Family("llama", "Llama, SmolLM, SmolLM2, TinyLlama", whole_heads=True, equal=_like_llama),
        Family("mistral", "Mistral", biases=lambda config: Biases()),
        Family("qwen2", "Qwen2, Qwen2.5", biases=lambda config: Biases(qkv=True), layer_types=True, equal=_like_qwen2),
        Family(
            "qwen3",
            "Qwen3",
            biases=_of_attention,
            qk_norm=True,
            layer_types=True,
            inexact={"head_dim": _NORMS_OF_HEADS},
        ),
        Family("smollm3", "SmolLM3", layer_types=True),
        Family("granite", "Granite (dense)"),
        Family(
            "seed_oss",
            "Seed-OSS",
            biases=lambda config: Biases(config.attention_bias, config.attention_out_bias, config.mlp_bias),
        ),
        Family("gemma2", "Gemma 2", **_GEMMA, inexact={"disp": _READ_WHOLE}, equal=_own_if_heads_divide("gemma2")),
        Family(
            "gemma3_text",
            "Gemma 3 (text)",
            **_GEMMA,
            qk_norm=True,
            ropes_by_type=True,
            inexact={"head_dim": _NORMS_OF_HEADS, "disp": _READ_WHOLE},
            equal=_own_if_heads_divide("gemma3_text"),
        ),
        Family("olmo2", "OLMo 2", **_OLMO),
        Family("olmo3", "OLMo 3", **_OLMO, layer_types=True, ropes_by_type=True),
        Family("ministral", "Ministral", biases=lambda config: Biases(), layer_types=True),
        Family(
            "ministral3",
            "Ministral 3",
            biases=lambda config: Biases(),
            own_attention=True,
            inexact={"head_dim": "narrower heads here do not scale queries by their positions: use kv_group"},
        ),
        Family(
            "ernie4_5",
            "ERNIE 4.5 (dense)",
            biases=lambda config: Biases(config.use_bias, config.use_bias, config.use_bias),
            own_attention=True,
            neighbours=True,
            inexact={"head_dim": _NEIGHBOURS},
        ),
        Family(
            "hunyuan_v1_dense",
            "Hunyuan (dense)",
            biases=_of_attention,
            qk_norm=True,
            qk_norms=("query_layernorm", "key_layernorm"),
            own_attention=True,
            inexact={"head_dim": _NORMS_OF_HEADS},
        ),
        Family(
            "exaone4",
            "EXAONE 4",
            biases=lambda config: Biases(),
            qk_norm=True,
            own_attention=True,
            layer_types=True,
            blocks=_BEHIND,
            inexact={"head_dim": _NORMS_OF_HEADS, "disp": _READ_WHOLE},
        ),
        Family(
            "phi3",
            "Phi-3, Phi-3.5, Phi-4, Phi-4-mini",
            biases=lambda config: Biases(),
            fused=_QKV | _GATE_UP,
            partial=True,
            equal=_like_phi3,
        ),
        Family("glm", "GLM-4-9B, GLM-Edge", **_GLM, inexact={"head_dim": _NEIGHBOURS}),
        Family(
            "glm4",
            "GLM-4-0414",
            **_GLM,
            blocks=(
                Block("self_attn", "input_layernorm", "post_self_attn_layernorm"),
                Block("mlp", "post_attention_layernorm", "post_mlp_layernorm"),
            ),
            inexact={"head_dim": _NEIGHBOURS, "disp": _READ_WHOLE},
        ),
        Family("arcee", "Arcee (AFM)", mlp=_UNGATED, whole_heads=True, equal=_own_if_heads_divide("arcee")),
        Family(
            "nemotron",
            "Nemotron, Minitron",
            mlp=_UNGATED,
            layer_norm=True,
            unit_offset=True,
            partial=True,
            own_attention=True,
            inexact={"head_dim": "its RoPE rotates a part of each head, and the space pairs all of it: use kv_group"},
        ),
        Family(
            "jais2",
            "Jais 2",
            mlp=_UNGATED,
            layer_norm=True,
            whole_heads=True,
            equal=_own_if_heads_divide("jais2"),
        ),
        Family(
            "starcoder2",
            "StarCoder2",
            biases=lambda config: Biases(config.use_bias, config.use_bias, config.use_bias),
            mlp=("mlp.c_fc", "mlp.c_proj"),
            layer_norm=True,
        ),
        Family(
            "apertus",
            "Apertus",
            biases=_of_attention,
            mlp=_UNGATED,
            scalars=lambda config: 2,
            qk_norm=True,
            blocks=(Block("self_attn", "attention_layernorm"), Block("mlp", "feedforward_layernorm")),
            inexact={"head_dim": _NORMS_OF_HEADS},
        ),
        ExpertFamily("mixtral", "Mixtral", biases=lambda config: Biases()),
        ExpertFamily("qwen3_moe", "Qwen3-MoE", biases=_of_attention, inner="moe_intermediate_size", qk_norm=True),
        ExpertFamily(
            "gpt_oss",
            "gpt-oss (in bfloat16)",
            biases=_of_attention,
            router="mlp.router",
            expert_biases=True,
            interleaved=True,
            scalars=lambda config: config.num_attention_heads,  # sinks of attention
            own_attention=True,
            layer_types=True,
        ),
        ExpertFamily("olmoe", "OLMoE", biases=_of_attention, qk_norm=True, norms_all_heads=True, own_attention=True),
    )
}


def family_of(config: PretrainedConfig) -> Family:
    """The family of a transformers config, also of that of a cut model. Raises `UnsupportedModel` with the remedy."""
    name = family_name(config.model_type)
    if name not in FAMILIES:
        why = f" because {REASONS[name]}" if name in REASONS else ""
        raise UnsupportedModel(f"model family '{name}' is not supported{why}: use one of {', '.join(FAMILIES)}")
    return FAMILIES[name]
