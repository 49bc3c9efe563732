"""A causal LM whose layers differ in width, on transformers' own modules: the cut model of every family.

Only what a cut changes is here: linears of any width, RoPE on the kept pairs, value heads of another width than query
and key heads. `ATPLlamaConfig` says what a family has beside Llama: biases, norms of queries and keys, layers without
RoPE, multipliers. The decoder's forward is that of `Qwen2Model` (`LlamaModel` plus one mask per layer type), the head's
that of `LlamaForCausalLM`, or of `GraniteForCausalLM`, which adds logits_scaling.
"""

from __future__ import annotations

import copy
import functools
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import pad
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    GraniteForCausalLM,
    LlamaForCausalLM,
    PreTrainedModel,
    Qwen2Model,
)
from transformers import initialization as init
from transformers.cache_utils import Cache
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import (
    LlamaMLP,
    LlamaRMSNorm,
    LlamaRotaryEmbedding,
    eager_attention_forward,
)

from atp.models import attention
from atp.models.config import ATPLlamaConfig
from atp.models.selected import Selection

# Fused attention takes one width for all heads, and runs best on whole vector registers and tensor-core tiles.
HEAD_DIM_MULTIPLE = 8


class ATPLlamaAttention(nn.Module):
    """Grouped-query attention with its own number of heads, RoPE pairs and value width in each layer."""

    rope_index: Tensor | None

    def __init__(self, config: ATPLlamaConfig, layer_idx: int) -> None:
        super().__init__()
        shape = config.layer_shape(layer_idx)
        self.config = config
        self.layer_idx = layer_idx
        self.qk_head_dim = shape.qk_head_dim(config.uncut_head_dim)
        self.v_head_dim = shape.v_head_dim
        heads, kv_heads = shape.num_attention_heads, shape.num_key_value_heads
        # Serving engines read these three from the module.
        self.num_heads, self.num_key_value_heads, self.head_dim = heads, kv_heads, self.qk_head_dim
        self.num_key_value_groups = heads // kv_heads
        scale = config.attention_multiplier
        self.scaling = config.uncut_head_dim**-0.5 if scale is None else scale
        self.attention_dropout = config.attention_dropout
        self.sliding_window = config.window(layer_idx)
        self.use_rope = config.uses_rope(layer_idx)
        self.is_causal = True

        inputs, outputs = (shape.selected(f"attention_{end}", config.hidden_size) for end in ("inputs", "outputs"))
        self.q_proj = nn.Linear(inputs, heads * self.qk_head_dim, bias=config.attention_bias)
        self.k_proj = nn.Linear(inputs, kv_heads * self.qk_head_dim, bias=config.attention_bias)
        self.v_proj = nn.Linear(inputs, kv_heads * self.v_head_dim, bias=config.attention_bias)
        self.o_proj = nn.Linear(heads * self.v_head_dim, outputs, bias=bool(config.attention_out_bias))
        if config.qk_norm:
            self.q_norm = LlamaRMSNorm(self.qk_head_dim, eps=config.rms_norm_eps)
            self.k_norm = LlamaRMSNorm(self.qk_head_dim, eps=config.rms_norm_eps)
        self.register_buffer("rope_index", self.kept_rope_index(), persistent=False)

    def kept_rope_index(self) -> Tensor | None:
        """Positions of the kept pairs in the cos and sin of the uncut model, int64 [qk_head_dim]; None keeps all."""
        pairs = self.config.layer_shape(self.layer_idx).qk_pairs
        if pairs is None:
            return None
        half = self.config.uncut_head_dim // 2
        return torch.tensor(pairs + [half + pair for pair in pairs])

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
        tokens = hidden_states.shape[:-1]
        query, key, value = attention.project(self, hidden_states)
        query, key = (states.view(*tokens, -1, self.qk_head_dim) for states in (query, key))
        value = value.view(*tokens, -1, self.v_head_dim).transpose(1, 2)
        if self.config.qk_norm:
            query, key = self.q_norm(query), self.k_norm(key)
        cache = past_key_values if cache is None else cache
        implementation = self.config._attn_implementation
        # Zeros change neither scores nor outputs; unequal widths would take the slow, unfused path.
        width = -(-max(self.qk_head_dim, self.v_head_dim) // HEAD_DIM_MULTIPLE) * HEAD_DIM_MULTIPLE
        if self.use_rope:
            at_once = width if cache is None and implementation != "eager" else None
            query, key = attention.rotate(query, key, position_embeddings, self.rope_index, at_once)
        else:
            query, key = query.transpose(1, 2), key.transpose(1, 2)

        if cache is not None:
            key, value = cache.update(key, value, self.layer_idx)

        if implementation != "eager":
            query, key, value = (_pad_heads(heads, width) for heads in (query, key, value))
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(implementation, eager_attention_forward)
        output, weights = attend(
            self,
            query,
            key,
            value,
            attention_mask,
            dropout=self.attention_dropout if self.training else 0.0,
            scaling=self.scaling,
            sliding_window=self.sliding_window,
            **kwargs,
        )
        # One dimension for heads and their widths, as vLLM's attention returns them, or two.
        output = output.reshape(*tokens, query.shape[1], -1)[..., : self.v_head_dim]
        return self.o_proj(output.reshape(*tokens, -1)), weights


def _pad_heads(heads: Tensor, width: int) -> Tensor:
    missing = width - heads.shape[-1]
    return pad(heads, (0, missing)) if missing else heads


class ATPLlamaDecoderLayer(GradientCheckpointingLayer):
    """A decoder layer of its own widths; with shortcuts its residual connections pass through a matrix each."""

    def __init__(self, config: ATPLlamaConfig, layer_idx: int) -> None:
        super().__init__()
        shape, hidden = config.layer_shape(layer_idx), config.hidden_size
        mlp_config = copy.copy(config.per_layer_config[layer_idx])
        mlp_config.hidden_size = shape.selected("mlp_inputs", hidden)
        self.residual_multiplier = config.residual_multiplier
        self.self_attn = ATPLlamaAttention(config, layer_idx)
        self.mlp = LlamaMLP(mlp_config)
        if shape.mlp_outputs is not None or shape.mlp_inputs is not None:
            outputs = shape.selected("mlp_outputs", hidden)
            self.mlp.down_proj = nn.Linear(shape.intermediate_size, outputs, bias=config.mlp_bias)
        self.attention_selection = Selection(shape.attention_inputs, shape.attention_outputs)
        self.mlp_selection = Selection(shape.mlp_inputs, shape.mlp_outputs)
        self.input_layernorm = LlamaRMSNorm(hidden, eps=config.rms_norm_eps)
        self.post_attention_layernorm = LlamaRMSNorm(hidden, eps=config.rms_norm_eps)
        self.attention_shortcut, self.mlp_shortcut = (
            nn.Linear(hidden, hidden, bias=False) if config.shortcuts else nn.Identity() for _ in range(2)
        )

    def forward(self, hidden_states: Tensor, **kwargs: Any) -> Tensor:
        """hidden_states [batch, tokens, hidden]; kwargs are those of the attention."""
        attention, mlp = self.attention_selection, self.mlp_selection
        attended, _ = self.self_attn(hidden_states=attention.read(self.input_layernorm(hidden_states)), **kwargs)
        hidden_states = attention.add(self, self.attention_shortcut(hidden_states), attended)
        added = self.mlp(mlp.read(self.post_attention_layernorm(hidden_states)))
        return mlp.add(self, self.mlp_shortcut(hidden_states), added)


class ATPLlamaPreTrainedModel(PreTrainedModel):
    """What transformers must know about the class to load, initialize, split and checkpoint it."""

    config: ATPLlamaConfig
    config_class = ATPLlamaConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["ATPLlamaDecoderLayer"]
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True
    _can_record_outputs = {"hidden_states": ATPLlamaDecoderLayer, "attentions": ATPLlamaAttention}

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        # from_pretrained builds on the meta device, and no file holds the non-persistent buffers.
        if isinstance(module, ATPLlamaAttention) and module.rope_index is not None:
            init.copy_(module.rope_index, cast(Tensor, module.kept_rope_index()))
        if isinstance(module, Selection):
            for name, index in module.indices().items():
                if index is not None:
                    init.copy_(getattr(module, name), index)


class ATPLlamaModel(ATPLlamaPreTrainedModel, Qwen2Model):  # type: ignore[misc]  # whose config is no Qwen2Config
    """The decoder without its head."""

    def __init__(self, config: ATPLlamaConfig) -> None:
        super(Qwen2Model, self).__init__(config)  # the parent would first build every layer at full width
        self.padding_idx = config.pad_token_id
        self.vocab_size = config.vocab_size
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, self.padding_idx)
        self.layers = nn.ModuleList(ATPLlamaDecoderLayer(config, i) for i in range(config.num_hidden_layers))
        # Those of Qwen2 under other names.
        self.norm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)  # type: ignore[assignment]
        self.rotary_emb = LlamaRotaryEmbedding(config.without_layers())  # type: ignore[assignment]
        self.has_sliding_layers = "sliding_attention" in (config.layer_types or ())
        self.gradient_checkpointing = False
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        *,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """As in transformers: input_ids int64 [batch, tokens] or inputs_embeds [batch, tokens, hidden].

        vLLM refuses a class that does not name these three.
        """
        multiplier = self.config.embedding_multiplier
        if multiplier != 1 and (input_ids is None) != (inputs_embeds is None):
            embedded = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
            input_ids, inputs_embeds = None, embedded * multiplier
        return super().forward(input_ids=input_ids, position_ids=position_ids, inputs_embeds=inputs_embeds, **kwargs)


class ATPLlamaForCausalLM(ATPLlamaPreTrainedModel, GraniteForCausalLM):  # type: ignore[misc]  # nor a GraniteConfig
    """The cut model: loads, trains, generates and saves like any causal LM of transformers."""

    def __init__(self, config: ATPLlamaConfig) -> None:
        super(GraniteForCausalLM, self).__init__(config)  # the parent would first build a full-width model
        self.model = ATPLlamaModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @functools.wraps(GraniteForCausalLM.forward)  # generation reads the signature
    def forward(self, *inputs: Any, **options: Any) -> Any:  # type: ignore[override]
        # Granite's divides all logits, even by one, which makes a second copy of them.
        own = LlamaForCausalLM if self.config.logits_scaling == 1 else GraniteForCausalLM
        return own.forward(cast(Any, self), *inputs, **options)

    def _get_static_cache_init_shape(self) -> None:
        # Key and value widths differ, so a static cache must take its shapes from the first states it sees.
        return None


def place_indices(model: PreTrainedModel) -> None:
    """Sets the buffers of a cut model that no file holds, on the devices of its weights; any other model has none."""
    for layer in cast(Any, model.get_decoder()).layers:
        attention = layer.self_attn
        if isinstance(attention, ATPLlamaAttention) and (index := attention.kept_rope_index()) is not None:
            attention.rope_index = index.to(attention.q_proj.weight.device)
        for selection in (module for module in layer.children() if isinstance(module, Selection)):
            for name, index in selection.indices().items():
                setattr(selection, name, None if index is None else index.to(layer.input_layernorm.weight.device))


def register() -> None:
    """Registers the class and the training attention with transformers; calling it again changes nothing."""
    attention.register()
    AutoModel.register(ATPLlamaConfig, ATPLlamaModel, exist_ok=True)
    AutoModelForCausalLM.register(ATPLlamaConfig, ATPLlamaForCausalLM, exist_ok=True)


register()
