"""What the rest of the project needs to know of a model family."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any, ClassVar

from transformers import PretrainedConfig

from atp.ground.errors import InputError

CUT_MODEL_TYPE = "atp_llama"
"""`model_type` of the cut models of all families: Llama's decoder with per-layer widths and a few switches."""
Windows = int | None | dict[str, int | None]
"""Sliding window of attention, None for full attention: one for all layers, or one per layer type of the config."""
# By the names of transformers and of `atp_kernels`.
_ACTIVATIONS = {"silu": "silu", "gelu_pytorch_tanh": "gelu_tanh"}


class UnsupportedModel(InputError):
    """The model cannot be pruned, or not in the requested space."""


@dataclass(frozen=True)
class Linear:
    """Shape of one prunable linear of a decoder layer."""

    out_features: int
    in_features: int
    bias: bool


@dataclass(frozen=True)
class Biases:
    """Which linears of a decoder layer have a bias. qkv: q_proj, k_proj and v_proj; o: o_proj; mlp: all three."""

    qkv: bool = False
    o: bool = False
    mlp: bool = False


def is_cut(config: PretrainedConfig) -> bool:
    """Whether this is the config of a cut model, whose layers have widths of their own."""
    return config.model_type == CUT_MODEL_TYPE


def layer_config(config: PretrainedConfig, layer: int) -> PretrainedConfig:
    """The config of one decoder layer: that of the model, with the layer's own widths where layers differ."""
    return config.per_layer_config[layer] if is_cut(config) else config


class Family:
    """Llama's decoder: each layer adds attention(RMSNorm(x)) to x, then MLP(RMSNorm(x)) with a gated MLP.

    Subclasses override what differs. name: `model_type` of the transformers config.
    """

    inexact: ClassVar[dict[str, str]] = {}
    """Mask spaces whose cut would change what the model computes, each with the reason."""
    qk_norm: ClassVar[bool] = False
    """Whether an RMSNorm over head_dim, shared by all heads, follows q_proj and k_proj."""
    layer_types: ClassVar[bool] = False
    """Whether config.layer_types says which layers use the sliding window; the decoder then takes a mask per type."""
    whole_heads: ClassVar[bool] = False
    """Whether transformers wants hidden_size to be a multiple of the number of heads even where head_dim is given."""

    def __init__(self, name: str) -> None:
        self.name = name

    def biases(self, config: PretrainedConfig) -> Biases:
        """The biases of every decoder layer."""
        return Biases(config.attention_bias, config.attention_bias, config.mlp_bias)

    def sliding_window(self, config: PretrainedConfig) -> int | None:
        """How many tokens a token of a sliding layer sees, itself included; None where no layer slides."""
        return config.sliding_window if self.layer_types else None

    def logits_divisor(self, config: PretrainedConfig) -> float:
        """What the outputs of the head are divided by to give logits; config: also that of a cut model."""
        return 1.0

    def refuses(self, config: PretrainedConfig, space: str) -> str | None:
        """Why a cut in this space would change what the model computes; None where the cut is exact."""
        beyond = config.beyond_whole_heads() if is_cut(config) else None
        if beyond is not None:
            return f"the model is cut already and {beyond}, so give the model that it was cut from"
        return self.inexact.get(space)

    def head_dim(self, config: PretrainedConfig) -> int:
        """Width of an attention head."""
        return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads

    def linears(self, config: PretrainedConfig) -> dict[str, Linear]:
        """The prunable linears of a decoder layer by their names in it, e.g. `self_attn.q_proj`.

        config: where layers differ in width, that of one of them (`layer_config`).
        """
        hidden, inner, biases = config.hidden_size, config.intermediate_size, self.biases(config)
        queries = config.num_attention_heads * self.head_dim(config)
        keys = config.num_key_value_heads * self.head_dim(config)
        return {
            "self_attn.q_proj": Linear(queries, hidden, biases.qkv),
            "self_attn.k_proj": Linear(keys, hidden, biases.qkv),
            "self_attn.v_proj": Linear(keys, hidden, biases.qkv),
            "self_attn.o_proj": Linear(hidden, queries, biases.o),
            "mlp.gate_proj": Linear(inner, hidden, biases.mlp),
            "mlp.up_proj": Linear(inner, hidden, biases.mlp),
            "mlp.down_proj": Linear(hidden, inner, biases.mlp),
        }

    def norms(self, config: PretrainedConfig) -> dict[str, int]:
        """The RMSNorms of a decoder layer by their names in it, with their widths."""
        norms = {"input_layernorm": config.hidden_size, "post_attention_layernorm": config.hidden_size}
        if self.qk_norm:
            norms |= {"self_attn.q_norm": self.head_dim(config), "self_attn.k_norm": self.head_dim(config)}
        return norms

    def norm_params(self, config: PretrainedConfig) -> int:
        """Parameters of a decoder layer that no space removes: those of its norms."""
        return sum(self.norms(config).values())

    def activation(self, config: PretrainedConfig) -> str | None:
        """The MLP's activation by its name in `atp_kernels`; None where that has no such activation."""
        return _ACTIVATIONS.get(config.hidden_act)

    def windows(self, config: PretrainedConfig) -> Windows:
        """The sliding windows in the form in which the decoder takes its masks; config: also that of a cut model."""
        if is_cut(config):
            window, by_type = config.sliding_window, True
        else:
            window, by_type = self.sliding_window(config), self.layer_types
        if not by_type:
            return window
        return {kind: window if kind == "sliding_attention" else None for kind in sorted(set(config.layer_types))}

    def cut_values(self, config: PretrainedConfig, cut_class: type[PretrainedConfig]) -> dict[str, Any]:
        """Keyword arguments of `cut_class`, the config class of cut models, that describe the model, cut or not.

        Values have the names that they have in the whole model's config. What its class does not declare has no meaning
        in it, whatever the config.json says, and must gain none. Where the model was loaded from is left out: no cut
        model lies there, and PEFT would read that folder's config as a cut model's.
        """
        declared = {field.name for field in fields(config)}
        unknown = {field.name for field in fields(cut_class)} - declared
        dropped = unknown | {"model_type", "architectures", "transformers_version", "_name_or_path"}
        values = {key: value for key, value in config.to_dict().items() if key not in dropped}
        biases = self.biases(config)
        return values | {
            "family": self.name,
            "head_dim": self.head_dim(config),
            "attention_bias": biases.qkv,
            "attention_out_bias": biases.o,
            "mlp_bias": biases.mlp,
            "qk_norm": self.qk_norm,
            "sliding_window": self.sliding_window(config),
        }

    def stock_config(self, config: PretrainedConfig) -> PretrainedConfig | None:
        """The config of a class of transformers' own that computes what a cut model with equal layers does.

        config: of the cut model, whose layers all have the widths in it. None where transformers has no such class.
        """
        return None


def as_class(config: PretrainedConfig, stock: type[PretrainedConfig], **changes: Any) -> PretrainedConfig:
    """The values of a cut model's config as another config class, which takes the keys that it declares.

    head_dim is set even where the class does not declare it: Granite and SmolLM3 read it all the same.
    """
    declared = {field.name for field in fields(stock)} - {"model_type", "architectures", "transformers_version"}
    values = {key: value for key, value in config.to_dict().items() if key in declared}
    return stock(**values | {"head_dim": config.head_dim} | changes)
