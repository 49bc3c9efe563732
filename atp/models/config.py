"""Configs of cut models: each is its family's own, with the widths of every layer in `per_layer_config`.

Annotations are evaluated here (no `from __future__ import annotations`): `strict` checks no type that is text.
"""

import copy
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from functools import cache
from importlib import import_module
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, ClassVar, cast

from huggingface_hub.dataclasses import strict
from huggingface_hub.errors import StrictDataclassError
from transformers import CONFIG_MAPPING, AutoConfig, PretrainedConfig

from atp.families import FAMILIES, SKIPPED, cut_type, declared, family_of
from atp.ground.errors import shorten
from atp.models.earlier import from_earlier

_FACTORS = ("attention_multiplier", "residual_multiplier", "embedding_multiplier", "logits_scaling")
_LARGEST_FACTOR = 1_000_000  # beyond every model there is
SELECTIONS = ("attention_inputs", "attention_outputs", "mlp_inputs", "mlp_outputs")
BLOCKS = tuple(SKIPPED.values())
"""What a layer's `skip` can name."""


@dataclass(frozen=True)
class LayerShape:
    """Widths of one decoder layer.

    qk_pairs: kept RoPE pairs in rising order, as positions in [0, head_dim / 2); None keeps all of them. Each pair is
    two rows of every query and key head. v_head_dim: width of a value head; intermediate_size: width of the MLP.
    attention_inputs, mlp_inputs: the positions of the hidden state that a block reads; attention_outputs, mlp_outputs:
    those that it adds to. In rising order; None for all of them. skip: which of `BLOCKS` the layer lacks. num_experts:
    how many experts stand in place of the MLP; None where it is one. moe_intermediate_size: their width, in families
    that call it so.
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
    skip: tuple[str, ...] = ()
    num_experts: int | None = None
    moe_intermediate_size: int | None = None

    def selected(self, key: str, hidden_size: int) -> int:
        """How many positions of the hidden state a selection (`attention_inputs`, ...) has."""
        positions = getattr(self, key)
        return hidden_size if positions is None else len(positions)

    def qk_head_dim(self, head_dim: int) -> int:
        """Width of a query or key head, for the head_dim of the model before any cut."""
        return head_dim if self.qk_pairs is None else 2 * len(self.qk_pairs)

    def has_whole_heads(self, head_dim: int) -> bool:
        """Whether heads have the width of the model before any cut."""
        return self.qk_pairs is None and self.v_head_dim == head_dim

    @property
    def heads(self) -> tuple[int, int]:
        """Query heads and key-value heads, none where the layer lacks attention."""
        lacks = SKIPPED["self_attn"] in self.skip
        return (0, 0) if lacks else (self.num_attention_heads, self.num_key_value_heads)

    def linears(self, head_dim: int, hidden_size: int, mlp: tuple[str, ...]) -> dict[str, tuple[int, int]]:
        """(rows, columns) of the weights of a layer's linears, by their names in it; experts are none.

        mlp: as in `atp.families.Family`.
        """
        qk, queries, keys = self.qk_head_dim(head_dim), self.num_attention_heads, self.num_key_value_heads
        read, written, mlp_read, mlp_written = (self.selected(key, hidden_size) for key in SELECTIONS)
        attention = {
            "self_attn.q_proj": (queries * qk, read),
            "self_attn.k_proj": (keys * qk, read),
            "self_attn.v_proj": (keys * self.v_head_dim, read),
            "self_attn.o_proj": (written, queries * self.v_head_dim),
        }
        linears = attention
        if self.num_experts is None:
            linears |= {name: (self.intermediate_size, mlp_read) for name in mlp[:-1]}
            linears[mlp[-1]] = (mlp_written, self.intermediate_size)
        return {name: sides for name, sides in linears.items() if SKIPPED[name.partition(".")[0]] not in self.skip}


_WIDTHS = [field.name for field in fields(LayerShape) if field.name != "skip"]


class CutConfig(PretrainedConfig if TYPE_CHECKING else object):  # type: ignore[misc]
    """Placed before the config class of a family, whose keys a cut model has.

    Widths are in transformers' own `per_layer_config`: those of a layer that differ from the keys of the whole config.
    The keys are the fields of `LayerShape`, and `layer_shape` reads them. head_dim is that of the model before
    the cut, because it sets the RoPE frequencies and the softmax scale. shortcuts: a matrix on each residual
    connection, as SliceGPT needs; hidden_size is then the width that is left of the residual stream.
    """

    # TRL reads this attribute of classes that are not in transformers. Empty rather than None, because transformers
    # searches it; no field, so that an empty one does not appear in config.json.
    auto_map: ClassVar[Mapping[str, str]] = MappingProxyType({})
    family: ClassVar[str]  # that the model was cut from, by its model_type
    if TYPE_CHECKING:
        hidden_size: int
        num_attention_heads: int
        num_hidden_layers: int
        head_dim: int
        intermediate_size: int
        shortcuts: bool

    def __post_init__(self, **kwargs: Any) -> None:
        # Some families do not declare head_dim, and read it all the same.
        given = kwargs.pop("head_dim", None) or getattr(self, "head_dim", None)
        self.head_dim = given or self.hidden_size // self.num_attention_heads
        super().__post_init__(**kwargs)
        import_module("atp.models.cut").model_classes(self.family)  # which whoever has a config may want

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """As in transformers; also from the config.json of earlier versions, which had one class for all families."""
        values = from_earlier(config_dict)
        kind = config_class(values["model_type"].removeprefix(cut_type(""))) if values is not config_dict else cls
        return super(CutConfig, kind).from_dict(values, **kwargs)

    @staticmethod
    def from_whole(config: PretrainedConfig, **changes: Any) -> "CutConfig":
        """The config of a cut model from that before the cut; changes: what the cut sets, e.g. per_layer_config.

        What the config's class does not declare has no meaning in it, whatever the config.json says, and is left out.
        So is where the model was loaded from: no cut model lies there, and PEFT would read that folder's config as a
        cut model's.
        """
        kept = {field.name for field in fields(cast(Any, config))} | {
            *config.attribute_map.values(),
            "per_layer_config",
        }
        kept -= {"architectures", "transformers_version"}
        values = {key: value for key, value in config.to_dict().items() if key in kept}
        family = family_of(config)
        cut = config_class(family.name)(**values | {"head_dim": family.head_dim(config)} | changes)
        cut._attn_implementation = config._attn_implementation
        cut._experts_implementation = config._experts_implementation
        return cut

    def without_layers(self) -> Any:
        """A copy without the widths of single layers, as transformers' RoPE needs it.

        RoPE divides hidden_size by the heads of the whole model even where head_dim is given.
        """
        whole = copy.copy(self)
        whole.per_layer_config = None
        return whole

    @property
    def logit_scale(self) -> float:
        """What vLLM multiplies the head's outputs by: it computes them without our class."""
        return 1 / cast(float, declared(self, "logits_scaling", 1.0))

    def layer_shape(self, layer: int) -> LayerShape:
        """Widths of one layer."""
        own: Any = self.per_layer_config[layer]
        widths: dict[str, Any] = {name: getattr(own, name, None) for name in _WIDTHS}  # dense families have no experts
        if widths["v_head_dim"] is None:
            widths["v_head_dim"] = self.head_dim
        return LayerShape(**widths, skip=tuple(getattr(own, "skip", ())))

    def has_plain_layers(self) -> bool:
        """Whether all layers have one set of widths, the whole ones where transformers has no name for others."""
        if self.shortcuts or self.per_layer_attributes:
            return False
        shapes = [self.layer_shape(layer) for layer in range(self.num_hidden_layers)]
        return self.lacking() is None and all(_beyond_whole_heads(shape, self.head_dim) is None for shape in shapes)

    def beyond_whole_heads(self) -> str | None:
        """What a cut took beside whole heads, MLP channels and blocks, as a clause; None where it can be cut again."""
        if self.shortcuts:
            return "its residual stream is sliced (SliceGPT)"
        for layer in range(self.num_hidden_layers):
            if (beyond := _beyond_whole_heads(self.layer_shape(layer), self.head_dim)) is not None:
                return beyond.format(layer=layer)
        return None

    def lacking(self) -> str | None:
        """What the first layer without one of its blocks lacks, as a clause; None where all layers have both."""
        for layer in range(self.num_hidden_layers):
            if skip := self.layer_shape(layer).skip:
                return f"layer {layer} has no {' and no '.join(skip)}"
        return None

    def gone(self) -> dict[str, list[int]]:
        """The layers that lack a block, by what `skip` calls it; without those that all layers have."""
        skips = [self.layer_shape(layer).skip for layer in range(self.num_hidden_layers)]
        found = {block: [layer for layer, skip in enumerate(skips) if block in skip] for block in BLOCKS}
        return {block: layers for block, layers in found.items() if layers}

    def own_widths(self, layer: int) -> dict[str, Any]:
        """The keys of `LayerShape` in which layers differ, with their values in one layer."""
        own = self.per_layer_config[layer]
        return {key: getattr(own, key) for key in self.per_layer_attributes or ()}

    def window(self, layer: int) -> int | None:
        """The sliding window of one layer, None for full attention."""
        types = declared(self, "layer_types", None)
        slides = types is None or types[layer] == "sliding_attention"
        return family_of(self).sliding_window(self) if slides else None

    def uses_rope(self, layer: int) -> bool:
        """Whether one layer rotates its queries and keys."""
        rotated = declared(self, "no_rope_layers", None)
        return rotated is None or bool(rotated[layer])

    def validate_rope(self) -> None:
        """Checks rope_parameters; called by transformers."""
        whole = self.without_layers()
        whole.hidden_size = whole.num_attention_heads * whole.head_dim  # by which Phi-3 counts the pairs of a head
        super(CutConfig, type(self)).validate_rope(whole)

    def validate_architecture(self) -> None:
        """Checks every layer's widths; called by transformers. Raises ValueError naming layer and key."""
        layers = self.num_hidden_layers
        rotated = declared(self, "no_rope_layers", None)
        if rotated is not None and len(rotated) < layers:
            raise ValueError(
                f"no_rope_layers describes {len(rotated)} layers and num_hidden_layers is {layers}: give one entry per "
                "layer"
            )
        for key in _FACTORS:
            value = declared(self, key, 1.0)
            if not 0 < abs(value) <= _LARGEST_FACTOR:
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
        if shape.moe_intermediate_size is not None and shape.moe_intermediate_size < 1:
            yield "moe_intermediate_size", "an expert keeps at least one channel"
        taken = 0 if shape.num_experts is None else cast(Any, self).num_experts_per_tok
        if shape.num_experts is not None and shape.num_experts < taken:
            yield "num_experts", f"each token takes {taken} of them (num_experts_per_tok)"
        if not set(shape.skip) <= set(BLOCKS):
            yield "skip", f"name only {' and '.join(BLOCKS)}"
        limits = {"qk_pairs": ("head_dim / 2", self.head_dim // 2)}
        limits |= {key: ("hidden_size", self.hidden_size) for key in SELECTIONS}
        for key, (name, limit) in limits.items():
            positions = getattr(shape, key)
            if positions is None:
                continue
            if not positions:
                yield key, "a layer keeps at least one"
            elif not _rise(positions, limit):
                yield key, f"positions are distinct, rising and below {name} = {limit}"
            elif key == "qk_pairs" and family_of(self).qk_norm:
                yield key, "a model with qk_norm keeps all pairs, because the norm is over all of them"


def _rise(positions: Any, limit: int) -> bool:
    """Whether these are whole numbers from 0 to below the limit, in rising order."""
    if not isinstance(positions, list) or any(type(position) is not int for position in positions):
        return False
    return positions == sorted(set(positions)) and positions[0] >= 0 and positions[-1] < limit


def _beyond_whole_heads(shape: LayerShape, head_dim: int) -> str | None:
    if not shape.has_whole_heads(head_dim):
        return f"the heads of layer {{layer}} are narrower than head_dim {head_dim} (space head_dim)"
    if any(getattr(shape, key) is not None for key in SELECTIONS):
        return "layer {layer} reads or writes a part of the hidden state (space disp)"
    return None


@cache
def config_class(name: str) -> type[CutConfig]:
    """The config class of the cut models of a family, known to transformers from then on."""
    stock: Any = CONFIG_MAPPING[name]

    @strict
    class Config(CutConfig, stock):
        family = name
        model_type = cut_type(name)
        # Widths that transformers has no name for; None is the whole width.
        qk_pairs: list[int] | None = None
        v_head_dim: int | None = None
        attention_inputs: list[int] | None = None
        attention_outputs: list[int] | None = None
        mlp_inputs: list[int] | None = None
        mlp_outputs: list[int] | None = None
        shortcuts: bool = False

    Config.__name__ = Config.__qualname__ = f"ATP{stock.__name__}"
    Config.__module__ = "atp.models"
    if FAMILIES[name].fused:  # whose linears are Mistral's in the cut model
        Config.base_model_tp_plan = CONFIG_MAPPING["mistral"].base_model_tp_plan
    AutoConfig.register(Config.model_type, Config, exist_ok=True)
    return Config
