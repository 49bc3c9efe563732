"""Cut models: each is its family's own class of transformers, with layers that differ in width.

Layer i is the family's decoder layer made from `config.per_layer_config[i]`, as transformers itself means to make it,
and nothing else changes: forward, cache, masks and RoPE are the family's. Where the family fuses projections, those of
a block are linears of their own, as in Mistral, which computes the same. Two parts of a layer are ours, where the
family's cannot hold what is left: attention whose heads are narrower than head_dim or rotated in part (`CutAttention`),
and a layer whose blocks see a part of the residual stream or pass it through a matrix (`CutLayer`). A block that the
layer's `skip` names is left out.
"""

from __future__ import annotations

import copy
from functools import cache
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import pad
from transformers import (
    CONFIG_MAPPING,
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_MAPPING,
    AutoModel,
    AutoModelForCausalLM,
    PreTrainedModel,
)
from transformers import initialization as init
from transformers.cache_utils import Cache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.gemma2.modeling_gemma2 import eager_attention_forward
from transformers.models.mistral.modeling_mistral import MistralAttention, MistralMLP

from atp.families import FAMILIES, family_name
from atp.models import attention
from atp.models.config import SELECTIONS, CutConfig, LayerShape, config_class
from atp.models.selected import Indexed, Selection

# Fused attention takes one width for all heads, and runs best on whole vector registers and tensor-core tiles.
HEAD_DIM_MULTIPLE = 8


class CutAttention(Indexed):
    """Placed before the class of a family's attention: heads keep some RoPE pairs, and values have their own width.

    head_dim: width of a query or key head. The families of `atp.families` compute what is here, with these differences
    between their classes: norms of queries and keys, layers without RoPE, the place of the sliding window, and a
    dropout after the last linear, which no cut model has.
    """

    pads = True  # whether heads are filled with zeros up to `HEAD_DIM_MULTIPLE`
    pairs: list[int] | None = None

    def narrow(self, config: CutConfig, shape: LayerShape) -> None:
        """Sets the widths of an attention that has those of whole heads."""
        module: Any = self
        self.whole_dim, self.pairs = config.head_dim, shape.qk_pairs
        module.head_dim, module.v_head_dim = shape.qk_head_dim(config.head_dim), shape.v_head_dim
        module.sliding_window = config.window(module.layer_idx)
        self.register_indices()

    def indices(self) -> dict[str, Tensor | None]:
        """Positions of the kept pairs in the cos and sin of the uncut model, int64 [head_dim]; None keeps all."""
        pairs = self.pairs
        half = 0 if pairs is None else self.whole_dim // 2
        return {"rope_index": None if pairs is None else torch.tensor(pairs + [half + pair for pair in pairs])}

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        attention_mask: Tensor | None = None,
        cache: Cache | None = None,
        past_key_values: Cache | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """hidden_states [batch, tokens, inputs]; position_embeddings: cos and sin [batch or 1, tokens, head_dim].

        The cache is `cache` in newer transformers and `past_key_values` in older ones. Returns the output
        [batch, tokens, outputs] and the attention weights, None where the implementation does not form them.
        """
        module: Any = self
        tokens = hidden_states.shape[:-1]
        qk, v = module.head_dim, getattr(module, "v_head_dim", module.head_dim)
        query, key, value = attention.project(module, hidden_states)
        query, key = (states.view(*tokens, -1, qk) for states in (query, key))
        value = value.view(*tokens, -1, v).transpose(1, 2)
        if hasattr(module, "q_norm"):
            query, key = module.q_norm(query), module.k_norm(key)
        cache = past_key_values if cache is None else cache
        implementation = module.config._attn_implementation
        # Zeros change neither scores nor outputs; unequal widths would take the slow, unfused path.
        pads = self.pads and implementation != "eager"
        width = -(-max(qk, v) // HEAD_DIM_MULTIPLE) * HEAD_DIM_MULTIPLE if pads else None
        if getattr(module, "use_rope", True):
            index = getattr(module, "rope_index", None)
            at_once = width if cache is None else None
            query, key = attention.rotate(query, key, position_embeddings, index, at_once)
        else:
            query, key = query.transpose(1, 2), key.transpose(1, 2)

        if cache is not None:
            key, value = cache.update(key, value, module.layer_idx)

        if width is not None:
            query, key, value = (_pad_heads(heads, width) for heads in (query, key, value))
        softcap = getattr(module, "attn_logit_softcapping", None)
        if softcap is not None:
            kwargs = {**kwargs, "softcap": softcap}
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(implementation, eager_attention_forward)
        output, weights = attend(
            self,
            query,
            key,
            value,
            attention_mask,
            dropout=module.attention_dropout if self.training else 0.0,
            scaling=self.scaling,
            sliding_window=getattr(module, "sliding_window", getattr(module.config, "sliding_window", None)),
            **kwargs,
        )
        # One dimension for heads and their widths, as vLLM's attention returns them, or two.
        output = output.reshape(*tokens, query.shape[1], -1)[..., :v]
        return module.o_proj(output.reshape(*tokens, -1)), weights


def _pad_heads(heads: Tensor, width: int) -> Tensor:
    missing = width - heads.shape[-1]
    return pad(heads, (0, missing)) if missing else heads


class CutLayer(nn.Module):
    """Placed before the class of a family's layer, whose blocks read and write a part of the residual stream.

    With shortcuts (SliceGPT) the residual connections pass through a matrix each.
    """

    def wrap(self, config: CutConfig, shape: LayerShape) -> None:
        """Sets what the family's layer lacks."""
        hidden = config.hidden_size
        self.attention_selection = Selection(shape.attention_inputs, shape.attention_outputs)
        self.mlp_selection = Selection(shape.mlp_inputs, shape.mlp_outputs)
        attention, mlp = FAMILIES[config.family].blocks
        self.norms_before = attention.before, mlp.before
        self.attention_shortcut, self.mlp_shortcut = (
            nn.Linear(hidden, hidden, bias=False) if config.shortcuts else nn.Identity() for _ in range(2)
        )

    def forward(self, hidden_states: Tensor, **kwargs: Any) -> Tensor:
        """hidden_states [batch, tokens, hidden]; kwargs are those of the attention."""
        layer: Any = self
        attention, mlp = self.attention_selection, self.mlp_selection
        first, second = (getattr(layer, str(name)) for name in self.norms_before)
        attended, _ = layer.self_attn(hidden_states=attention.read(first(hidden_states)), **kwargs)
        hidden_states = attention.add(layer, self.attention_shortcut(hidden_states), attended)
        added = layer.mlp(mlp.read(second(hidden_states)))
        return mlp.add(layer, self.mlp_shortcut(hidden_states), added)


class SkippedAttention(nn.Module):
    """Attention that a layer lacks: it adds nothing."""

    def __init__(self, layer_idx: int) -> None:
        super().__init__()
        self.layer_idx = layer_idx

    def forward(self, hidden_states: Tensor, **kwargs: Any) -> tuple[Tensor, None]:
        """Zeros like hidden_states. A cache gets a number per token, as the first layer's says how long a text is."""
        cache = kwargs.get("cache", kwargs.get("past_key_values"))
        if cache is not None:
            states = torch.zeros_like(hidden_states[:, None, :, :1])  # those of no width count as no text
            cache.update(states, states, self.layer_idx)
        return torch.zeros_like(hidden_states), None


class SkippedMLP(nn.Module):
    """The MLP that a layer lacks: it adds nothing."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        return torch.zeros_like(hidden_states)


def _layer(kind: type[nn.Module], config: CutConfig, index: int) -> nn.Module:
    """One decoder layer of the widths that the config has for it."""
    family, own = FAMILIES[config.family], config.per_layer_config[index]
    layer: Any = kind(own, index)
    if any(name.startswith("self_attn.") for name in family.fused):
        layer.self_attn = MistralAttention(own, index)
    if any(name.startswith("mlp.") for name in family.fused):
        layer.mlp = MistralMLP(own)
    for module in layer.modules():
        if hasattr(module, "config"):
            module.config = config  # that of the model, which says how to attend
    shape = config.layer_shape(index)
    # Serving engines read these two from the module.
    layer.self_attn.num_heads, layer.self_attn.num_key_value_heads = (
        shape.num_attention_heads,
        shape.num_key_value_heads,
    )
    in_part = not family.own_attention and family.rotated(config) < config.head_dim
    if in_part or not shape.has_whole_heads(config.head_dim):
        place_before(layer.self_attn, CutAttention).narrow(config, shape)
    if config.shortcuts or any(getattr(shape, key) is not None for key in SELECTIONS):
        place_before(layer, CutLayer).wrap(config, shape)
    for name, (rows, columns) in shape.linears(config.head_dim, config.hidden_size, family.mlp).items():
        linear = layer.get_submodule(name)
        if linear.weight.shape != (rows, columns):
            block, _, name = name.partition(".")
            setattr(layer.get_submodule(block), name, nn.Linear(columns, rows, bias=linear.bias is not None))
    skipped: dict[str, nn.Module] = {"self_attn": SkippedAttention(index)} if "attention" in shape.skip else {}
    skipped |= {"mlp": SkippedMLP()} if "mlp" in shape.skip else {}
    for place in family.blocks:
        if place.module in skipped:
            setattr(layer, place.module, skipped[place.module])
            for norm in filter(None, (place.before, place.after)):
                setattr(layer, norm, nn.Identity())
    return layer


def place_before(module: nn.Module, ours: type[nn.Module]) -> Any:
    """The module with our class before its own: same object, parameters and hooks."""
    kinds: Any = (ours, type(module))  # classes are hashable, which mypy denies of modules'
    module.__class__ = _both(*kinds)
    return module


@cache
def _both(ours: type[nn.Module], stock: type[nn.Module]) -> type[nn.Module]:
    name = f"{ours.__name__.removesuffix('Attention').removesuffix('Layer')}{stock.__name__}"
    return type(name, (ours, stock), {"__module__": ours.__module__})


class CutModel(PreTrainedModel if TYPE_CHECKING else object):  # type: ignore[misc]
    """Placed before the classes of a family's decoder and causal LM, whose layers it replaces."""

    def __init__(self, config: CutConfig) -> None:
        bare = config.without_layers()
        bare.num_hidden_layers = 1  # the family's class would build every layer at full width
        super().__init__(bare)
        config._attn_implementation = bare._attn_implementation
        config._experts_implementation = bare._experts_implementation
        self.config = config
        if self.base_model is self:
            kind = type(cast(Any, self).layers[0])
            self.layers = nn.ModuleList(_layer(kind, config, index) for index in range(config.num_hidden_layers))
            self._no_split_modules = sorted({kind.__name__} | {type(layer).__name__ for layer in self.layers})
        else:
            setattr(self, self.base_model_prefix, model_classes(config.family)[0](config))
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        # from_pretrained builds on the meta device, and no file holds the non-persistent buffers.
        if isinstance(module, Indexed):
            for name, index in module.indices().items():
                if index is not None:
                    init.copy_(getattr(module, name), index)

    def _get_static_cache_init_shape(self) -> None:
        # Key and value widths may differ, so a static cache must take its shapes from the first states it sees.
        return None


@cache
def model_classes(name: str) -> tuple[type[PreTrainedModel], type[PreTrainedModel]]:
    """The decoder and the causal LM of cut models of a family, known to transformers from then on."""
    config = config_class(name)
    made = []
    for auto, mapping in ((AutoModel, MODEL_MAPPING), (AutoModelForCausalLM, MODEL_FOR_CAUSAL_LM_MAPPING)):
        stock: Any = mapping[CONFIG_MAPPING[name]]
        values = {"__module__": "atp.models", "config_class": config}
        made.append(type(f"ATP{stock.__name__}", (CutModel, stock), values))
        auto.register(config, made[-1], exist_ok=True)
    return made[0], made[1]


def build(config: CutConfig) -> Any:
    """The causal LM that a config describes."""
    return model_classes(config.family)[1](config)


def copy_unsaved(model: Any, source: Any) -> None:
    """Gives a causal LM what no file holds outside its layers: RoPE's frequencies, and the factor of embeddings.

    A copy rather than new ones: a cast of the source may have rounded the frequencies, which must not change. A model
    of an unknown family gets all buffers that no file holds.
    """
    if family_name(model.config.model_type) not in FAMILIES:
        saved = source.state_dict().keys()
        for path, buffer in source.named_buffers():
            if path not in saved:
                place, _, name = path.rpartition(".")
                setattr(model.get_submodule(place), name, buffer)
        return
    model.model.rotary_emb = copy.deepcopy(source.model.rotary_emb)
    for name, buffer in source.model.embed_tokens.named_buffers():
        setattr(model.model.embed_tokens, name, buffer)


def complete(model: Any, source: Any, *, tie: bool = True) -> None:
    """Gives a causal LM what no state dict holds: tied weights, non-persistent buffers and the generation config.

    source: the causal LM that its weights are from. tie: whether to tie weights, which shards are already.
    """
    if tie and model.config.tie_word_embeddings:
        model.tie_weights()
    copy_unsaved(model, source)
    place_indices(model)
    model.generation_config = copy.deepcopy(source.generation_config)


def place_indices(model: PreTrainedModel) -> None:
    """Sets the buffers of a cut model that no file holds, on the devices of its weights; any other model has none."""
    if not isinstance(model, CutModel):
        return
    for layer in cast(Any, model.get_decoder()).layers:
        device = next(layer.parameters(), torch.empty(0)).device
        for module in layer.modules():
            for name, index in module.indices().items() if isinstance(module, Indexed) else ():
                setattr(module, name, None if index is None else index.to(device))


def register() -> None:
    """Registers all classes with transformers; calling it again changes nothing."""
    for name in FAMILIES:
        model_classes(name)
