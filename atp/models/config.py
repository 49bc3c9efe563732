"""Config of a cut model, whose layers differ in width; registered with transformers' AutoConfig by being imported.

Annotations are evaluated here (no `from __future__ import annotations`): `strict` checks no type that is text.
"""

import copy
import importlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from types import MappingProxyType
from typing import Any, ClassVar, cast

from huggingface_hub.dataclasses import strict
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, LlamaConfig, PretrainedConfig

from atp.families import family_of
from atp.families.family import CUT_MODEL_TYPE
from atp.ground.errors import shorten

_FACTORS = ("attention_multiplier", "residual_multiplier", "embedding_multiplier", "logits_scaling")
_LARGEST_FACTOR = 1_000_000  # beyond every model there is
SELECTIONS = ("attention_inputs", "attention_outputs", "mlp_inputs", "mlp_outputs")


@dataclass(frozen=True)
class LayerShape:
    """Widths of one decoder layer.

    qk_pairs: kept RoPE pairs in rising order, as positions in [0, head_dim / 2); None keeps all of them. Each pair is
    two rows of every query and key head. v_head_dim: width of a value head; intermediate_size: width of the MLP.
    attention_inputs, mlp_inputs: the positions of the hidden state that a block reads; attention_outputs, mlp_outputs:
    those that it adds to. In rising order; None for all of them.
    """

    num_attention_heads: int
    num_key_value_heads: int
    qk_pairs: list[int] | None
    v_head_dim: int
    intermediate_size: int
    attention_inputs: list[int] | None = None
    attention_outputs: list[int] | None = None
    mlp_inputs: list[int] | None = None
    mlp_outputs: list[int] | None = None

    def selected(self, key: str, hidden_size: int) -> int:
        """How many positions of the hidden state a selection (`attention_inputs`, ...) has."""
        positions = getattr(self, key)
        return hidden_size if positions is None else len(positions)

    def qk_head_dim(self, head_dim: int) -> int:
        """Width of a query or key head, for the head_dim of the model before any cut."""
        return head_dim if self.qk_pairs is None else 2 * len(self.qk_pairs)


@strict
class ATPLlamaConfig(LlamaConfig):
    """`LlamaConfig` plus the widths of every layer and what sets other families apart from Llama.

    Widths are in transformers' own `per_layer_config`: those of a layer that differ from the keys of the whole config.
    The keys are the fields of `LayerShape`, and `layer_shape` reads them. head_dim is that of the model before
    the cut, because it sets the RoPE frequencies and the softmax scale. shortcuts: a matrix on each residual
    connection, as SliceGPT needs; hidden_size is then the width that is left of the residual stream. A config that
    lacks a key has its default, which is what Llama does.
    """

    model_type = CUT_MODEL_TYPE
    # TRL reads this attribute of classes that are not in transformers. Empty rather than None, because transformers
    # searches it; no field, so that an empty one does not appear in config.json.
    auto_map: ClassVar[Mapping[str, str]] = MappingProxyType({})

    # Widths that transformers has no name for; None is the whole width.
    qk_pairs: list[int] | None = None
    v_head_dim: int | None = None
    attention_inputs: list[int] | None = None
    attention_outputs: list[int] | None = None
    mlp_inputs: list[int] | None = None
    mlp_outputs: list[int] | None = None
    shortcuts: bool = False
    family: str = "llama"  # that the model was cut from, by its model_type
    # Llama's attention_bias is that of q_proj, k_proj and v_proj, and of o_proj unless this differs.
    attention_out_bias: bool | None = None
    qk_norm: bool = False  # RMSNorm over the head_dim of queries and keys (Qwen3)
    sliding_window: int | None = None  # of the layers that layer_types calls sliding_attention; all, if it is None
    layer_types: list[str] | None = None
    no_rope_layers: list[int] | None = None  # per layer whether it uses RoPE: 1 or 0 (SmolLM3); None is everywhere
    attention_multiplier: float | int | None = None  # the softmax scale (Granite); None is head_dim ** -0.5
    residual_multiplier: float | int = 1.0  # of what a block adds to the residual stream (Granite)
    embedding_multiplier: float | int = 1.0  # of the embeddings (Granite)
    logits_scaling: float | int = 1.0  # the head's outputs are divided by it (Granite)

    def __post_init__(self, **kwargs: Any) -> None:
        if (shapes := kwargs.pop("layer_shapes", None)) is not None:  # what folders of earlier versions hold
            kwargs["per_layer_config"] = dict(enumerate(shapes))
        super().__post_init__(**kwargs)
        if self.attention_out_bias is None:
            self.attention_out_bias = self.attention_bias
        if self.layer_types is None:
            kind = "full_attention" if self.sliding_window is None else "sliding_attention"
            self.layer_types = [kind] * self.num_hidden_layers
        if self.no_rope_layers is not None:
            self.no_rope_layers = self.no_rope_layers[: self.num_hidden_layers]  # a list may be longer in transformers
        importlib.import_module("atp.models.llama")  # registers the model class, which whoever has a config may want

    @classmethod
    def from_whole(cls, config: PretrainedConfig, **changes: Any) -> "ATPLlamaConfig":
        """The config of a cut model from that before the cut; changes: what the cut sets, e.g. per_layer_config."""
        cut = cls(**family_of(config).cut_values(config, cls) | changes)
        cut._attn_implementation = config._attn_implementation
        return cut

    def without_layers(self) -> "ATPLlamaConfig":
        """A copy without the widths of single layers, as transformers' RoPE needs it.

        RoPE divides hidden_size by the heads of the whole model even where head_dim is given.
        """
        whole = copy.copy(self)
        whole.per_layer_config = None
        return whole

    @property
    def logit_scale(self) -> float:
        """What vLLM multiplies the head's outputs by: it computes them without our class."""
        return 1 / self.logits_scaling

    @property
    def uncut_head_dim(self) -> int:
        """head_dim, which is always set after construction."""
        return cast(int, self.head_dim)

    def layer_shape(self, layer: int) -> LayerShape:
        """Widths of one layer."""
        own = self.per_layer_config[layer]
        widths = {field.name: getattr(own, field.name) for field in fields(LayerShape)}
        if widths["v_head_dim"] is None:
            widths["v_head_dim"] = self.uncut_head_dim
        return LayerShape(**widths)

    def has_plain_layers(self) -> bool:
        """Whether all layers have one set of widths, the whole ones where transformers has no name for others."""
        if self.per_layer_attributes or self.shortcuts:
            return False
        shape = self.layer_shape(0)
        return shape.v_head_dim == self.head_dim and all(
            getattr(shape, key) is None for key in ("qk_pairs", *SELECTIONS)
        )

    def beyond_whole_heads(self) -> str | None:
        """What a cut took beside whole heads and MLP channels, as a clause; None where the model can be cut again."""
        if self.shortcuts:
            return "its residual stream is sliced (SliceGPT)"
        for layer in range(self.num_hidden_layers):
            shape = self.layer_shape(layer)
            if shape.qk_pairs is not None or shape.v_head_dim != self.head_dim:
                return f"the heads of layer {layer} are narrower than head_dim {self.head_dim} (space head_dim)"
            if any(getattr(shape, key) is not None for key in SELECTIONS):
                return f"layer {layer} reads or writes a part of the hidden state (space disp)"
        return None

    def own_widths(self, layer: int) -> dict[str, Any]:
        """The keys of `LayerShape` in which layers differ, with their values in one layer."""
        own = self.per_layer_config[layer]
        return {key: getattr(own, key) for key in self.per_layer_attributes or ()}

    def window(self, layer: int) -> int | None:
        """The sliding window of one layer, None for full attention."""
        return self.sliding_window if cast(list[str], self.layer_types)[layer] == "sliding_attention" else None

    def uses_rope(self, layer: int) -> bool:
        """Whether one layer rotates its queries and keys."""
        return self.no_rope_layers is None or bool(self.no_rope_layers[layer])

    def validate_rope(self) -> None:
        """Checks rope_parameters; called by transformers."""
        LlamaConfig.validate_rope(self.without_layers())

    def validate_architecture(self) -> None:
        """Checks every layer's widths; called by transformers. Raises ValueError naming layer and key."""
        layers = self.num_hidden_layers
        if self.no_rope_layers is not None and len(self.no_rope_layers) != layers:
            raise ValueError(
                f"no_rope_layers describes {len(self.no_rope_layers)} layers and num_hidden_layers is {layers}: give "
                "one entry per layer"
            )
        for key in _FACTORS:
            value = getattr(self, key)
            if value is not None and not 0 < abs(value) <= _LARGEST_FACTOR:
                raise ValueError(
                    f"{key} is {shorten(value)}: make it a number other than 0, of at most {_LARGEST_FACTOR}"
                )
        for layer in range(layers):
            try:
                shape = self.layer_shape(layer)
            except StrictDataclassError as error:
                raise ValueError(f"per_layer_config[{layer}]: {error}") from None
            for key, problem in self._problems(shape):
                raise ValueError(f"per_layer_config[{layer}].{key} is {getattr(shape, key)}: {problem}")

    def _problems(self, shape: LayerShape) -> Iterator[tuple[str, str]]:
        for key in ("num_key_value_heads", "num_attention_heads", "v_head_dim", "intermediate_size"):
            if getattr(shape, key) < 1:
                yield key, "a layer keeps at least one"
        if shape.num_key_value_heads > 0 and shape.num_attention_heads % shape.num_key_value_heads:
            yield "num_attention_heads", f"it must be a multiple of the {shape.num_key_value_heads} key-value heads"
        limits = {"qk_pairs": ("head_dim / 2", self.uncut_head_dim // 2)}
        limits |= {key: ("hidden_size", self.hidden_size) for key in SELECTIONS}
        for key, (name, limit) in limits.items():
            positions = getattr(shape, key)
            if positions is None:
                continue
            if not positions:
                yield key, "a layer keeps at least one"
            elif not _rise(positions, limit):
                yield key, f"positions are distinct, rising and below {name} = {limit}"
            elif key == "qk_pairs" and self.qk_norm:
                yield key, "a model with qk_norm keeps all pairs, because the norm is over all of them"


def _rise(positions: Any, limit: int) -> bool:
    """Whether these are whole numbers from 0 to below the limit, in rising order."""
    if not isinstance(positions, list) or any(type(position) is not int for position in positions):
        return False
    return positions == sorted(set(positions)) and positions[0] >= 0 and positions[-1] < limit


AutoConfig.register(CUT_MODEL_TYPE, ATPLlamaConfig, exist_ok=True)
