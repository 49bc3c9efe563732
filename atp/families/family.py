"""What the rest of the project needs to know of a model family."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any, NamedTuple

from transformers import PretrainedConfig

from atp.ground.errors import InputError

Windows = int | None | dict[str, int | None]
"""Sliding window of attention, None for full attention: one for all layers, or one per layer type of the config."""
# By the names of transformers and of `atp_kernels`.
_ACTIVATIONS = {"silu": "silu", "gelu_pytorch_tanh": "gelu_tanh"}


class UnsupportedModel(InputError):
    """The model cannot be pruned, or not in the requested space."""


@dataclass(frozen=True)
class Linear:
    """Shape of one prunable linear of a decoder layer.

    lora: whether it carries LoRA. A router does not, nor do its experts, whose stacked weights count as one linear with
    a row per expert, or per channel of each (`atp.families.experts.Channels`).
    """

    out_features: int
    in_features: int
    bias: bool
    lora: bool = True


@dataclass(frozen=True)
class Biases:
    """Which linears of a decoder layer have a bias. qkv: q_proj, k_proj and v_proj; o: o_proj; mlp: all of them."""

    qkv: bool = False
    o: bool = False
    mlp: bool = False


class Block(NamedTuple):
    """A residual block of a decoder layer: x + after(module(before(x))), by the names in it; None for no such norm."""

    module: str
    before: str | None
    after: str | None = None

    def holds(self, name: str) -> bool:
        """Whether a module or parameter of the layer, by its name in it, is gone where the layer lacks this block."""
        own = (self.module, self.before, self.after)
        return any(part is not None and (name == part or name.startswith(f"{part}.")) for part in own)


BLOCKS = (Block("self_attn", "input_layernorm"), Block("mlp", "post_attention_layernorm"))
"""The blocks of Llama and of most families, whose outputs no norm reads."""


SKIPPED = {"self_attn": "attention", "mlp": "mlp"}
"""By its module, what a layer's `skip` calls a block that it lacks."""

_CUT = "atp_"  # what `model_type` of a cut model has before that of its family


def cut_type(family: str) -> str:
    """`model_type` of the cut models of a family."""
    return _CUT + family


def family_name(model_type: str) -> str:
    """`model_type` of the family of a model, cut or not."""
    return model_type.removeprefix(_CUT)


def is_cut(config: PretrainedConfig) -> bool:
    """Whether this is the config of a cut model, whose layers have widths of their own."""
    return config.model_type.startswith(_CUT)


def layer_config(config: PretrainedConfig, layer: int) -> PretrainedConfig:
    """The config of one decoder layer: that of the model, with the layer's own widths where layers differ."""
    return config.per_layer_config[layer] if is_cut(config) else config


def _block(name: str) -> str:
    return name.partition(".")[0]


def lacks(config: Any, block: str) -> bool:
    """Whether a layer has no such block (`self_attn`, `mlp`); config: that of the layer (`layer_config`)."""
    return SKIPPED[block] in getattr(config, "skip", ())


def declared(config: Any, key: str, default: Any) -> Any:
    """The value of a key that the config's class declares; the default where it does not, whatever config.json says."""
    return getattr(config, key) if key in {field.name for field in fields(config)} else default


def _biases(config: PretrainedConfig) -> Biases:
    return Biases(config.attention_bias, config.attention_bias, config.mlp_bias)


def _no_limit(config: PretrainedConfig) -> str | None:
    return None


def _no_scalars(config: PretrainedConfig) -> int:
    return 0


@dataclass(frozen=True, kw_only=True)
class Family:
    """How a family differs from Llama, whose layers add attention(RMSNorm(x)) to x, then MLP(RMSNorm(x)), gated.

    The classes of transformers bring what the family computes; here is what the rest must know of it.

    name: `model_type` of the transformers config. models: what people call them. biases: of every decoder layer, from
    the config. qk_norm: whether an RMSNorm over head_dim, shared by all heads, follows q_proj and k_proj; qk_norms:
    their names. norms_all_heads: whether they are over all heads together. own_attention: whether attention is more
    than `CutAttention` computes, so that the family's own class must run. layer_types: whether config.layer_types says
    which layers use the sliding window; the decoder then takes a mask per type. ropes_by_type: whether RoPE has
    parameters per layer type. whole_heads: whether transformers wants hidden_size to be a multiple of the number of
    heads even where head_dim is given. blocks: attention and MLP with the norms around them. unit_offset: whether
    RMSNorms multiply by 1 + weight. inexact: mask spaces whose cut would change what the model computes, each with the
    reason. limit: why a model of some configs cannot be cut at all. equal: `model_type` of the class of transformers'
    own that computes what a cut model does whose layers all have the widths in its config, from that config; None where
    there is no such class. Left out, it is the family's own. fused: linears of transformers' class, each with
    those whose rows it holds one after the other; here these are linears of their own. partial: whether RoPE may rotate
    the first dimensions of a head alone (partial_rotary_factor). neighbours: whether it rotates dimensions 2 i and
    2 i + 1, and not i with the one half of them later. mlp: the linears of the MLP, of which the last reads what an
    activation makes of the one before it, times the one before that if there are three. layer_norm: whether norms
    around blocks are LayerNorms, with weight and bias. scalars: further parameters of a layer. space: the mask space to
    suggest.
    """

    name: str = field(kw_only=False)
    models: str = field(kw_only=False)
    biases: Callable[[PretrainedConfig], Biases] = _biases
    qk_norm: bool = False
    qk_norms: tuple[str, str] = ("q_norm", "k_norm")
    norms_all_heads: bool = False
    own_attention: bool = False
    layer_types: bool = False
    ropes_by_type: bool = False
    whole_heads: bool = False
    blocks: tuple[Block, ...] = BLOCKS
    unit_offset: bool = False
    inexact: Mapping[str, str] = field(default_factory=dict)
    limit: Callable[[PretrainedConfig], str | None] = _no_limit
    equal: Callable[[PretrainedConfig], str | None] | None = None
    fused: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    partial: bool = False
    neighbours: bool = False
    mlp: tuple[str, ...] = ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
    layer_norm: bool = False
    scalars: Callable[[PretrainedConfig], int] = _no_scalars
    space: str = "kv_group"

    def sliding_window(self, config: PretrainedConfig) -> int | None:
        """How many tokens a token of a sliding layer sees, itself included; None where no layer slides."""
        window: int | None = declared(config, "sliding_window", None)
        return window

    def logits_divisor(self, config: PretrainedConfig) -> float:
        """What the outputs of the head are divided by to give logits; config: also that of a cut model."""
        return float(declared(config, "logits_scaling", 1.0))

    def logits_cap(self, config: PretrainedConfig) -> float | None:
        """c where logits z become c * tanh(z / c); None where they stay as they are."""
        cap: float | None = declared(config, "final_logit_softcapping", None)
        return cap

    def caps_scores(self, config: PretrainedConfig) -> bool:
        """Whether attention caps its scores in the same way, which no fused attention does."""
        return declared(config, "attn_logit_softcapping", None) is not None

    def refuses(self, config: PretrainedConfig, space: str) -> str | None:
        """Why a cut in this space would change what the model computes; None where the cut is exact."""
        beyond = config.beyond_whole_heads() if is_cut(config) else None
        if beyond is not None:
            return f"the model is cut already and {beyond}, so give the model that it was cut from"
        rotated, width = self.rotated(config), self.head_dim(config)
        if space == "head_dim" and rotated < width and space not in self.inexact:
            return f"its RoPE rotates {rotated} of {width} dimensions of a head, which the space pairs: use kv_group"
        return self.limit(config) or self.inexact.get(space)

    def head_dim(self, config: PretrainedConfig) -> int:
        """Width of an attention head."""
        return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads

    def rotated(self, config: PretrainedConfig) -> int:
        """How many dimensions of a head RoPE rotates, the first ones."""
        share = config.rope_parameters.get("partial_rotary_factor", 1.0) if self.partial else 1.0
        return int(self.head_dim(config) * share)

    def linears(self, config: PretrainedConfig) -> dict[str, Linear]:
        """The prunable linears of a decoder layer by their names in it, e.g. `self_attn.q_proj`.

        config: where layers differ in width, that of one of them (`layer_config`). Those of a block that it lacks are
        empty, and no model has them.
        """
        hidden, inner, biases = config.hidden_size, config.intermediate_size, self.biases(config)
        queries = config.num_attention_heads * self.head_dim(config)
        keys = config.num_key_value_heads * self.head_dim(config)
        linears = {
            "self_attn.q_proj": Linear(queries, hidden, biases.qkv),
            "self_attn.k_proj": Linear(keys, hidden, biases.qkv),
            "self_attn.v_proj": Linear(keys, hidden, biases.qkv),
            "self_attn.o_proj": Linear(hidden, queries, biases.o),
            **{name: Linear(inner, hidden, biases.mlp) for name in self.mlp[:-1]},
            self.mlp[-1]: Linear(hidden, inner, biases.mlp),
        }
        return {name: Linear(0, 0, False) if lacks(config, _block(name)) else own for name, own in linears.items()}

    def norms(self, config: PretrainedConfig) -> dict[str, int]:
        """The norms of a decoder layer by their names in it, with their widths; config: as for `linears`."""
        around = (name for block in self.blocks for name in (block.before, block.after) if name is not None)
        norms = dict.fromkeys(around, config.hidden_size)
        if self.qk_norm:
            # Heads are read where all of them are normed, and then no cut has made their numbers differ.
            heads = (config.num_attention_heads, config.num_key_value_heads) if self.norms_all_heads else (1, 1)
            for name, count in zip(self.qk_norms, heads, strict=True):
                norms[f"self_attn.{name}"] = self.head_dim(config) * count
        gone = [block for block in self.blocks if lacks(config, block.module)]
        return {name: width for name, width in norms.items() if not any(block.holds(name) for block in gone)}

    def norm_params(self, config: PretrainedConfig) -> dict[str, int]:
        """Parameters of a decoder layer outside its linears by module: of its norms, and of an activation with some."""
        found = {name: width * (2 if self.layer_norm else 1) for name, width in self.norms(config).items()}
        learned = 0 if lacks(config, "mlp") else self.scalars(config)
        return found | ({"mlp.act_fn": learned} if learned else {})

    def activation(self, config: PretrainedConfig) -> str | None:
        """The MLP's activation by its name in `atp_kernels`; None where that has no such activation."""
        return _ACTIVATIONS.get(self.hidden_act(config))

    def hidden_act(self, config: PretrainedConfig) -> str:
        """The MLP's activation by its name in transformers."""
        return getattr(config, "hidden_act", None) or config.hidden_activation

    def windows(self, config: PretrainedConfig) -> Windows:
        """The sliding windows in the form in which the decoder takes its masks; config: also that of a cut model."""
        window = self.sliding_window(config)
        if not self.layer_types:
            return window
        return {kind: window if kind == "sliding_attention" else None for kind in sorted(set(config.layer_types))}
