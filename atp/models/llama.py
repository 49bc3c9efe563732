"""A Llama whose layers have widths of their own: kept KV groups, RoPE pairs, value dimensions and MLP channels.

Everything that is not a width is stock transformers: embeddings, norms, rotary frequencies, masks, cache, loss.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.activations import ACT2FN
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.configuration_llama import LlamaConfig
from transformers.models.llama.modeling_llama import (
    LlamaAttention,
    LlamaDecoderLayer,
    LlamaForCausalLM,
    LlamaMLP,
    LlamaModel,
    LlamaRMSNorm,
    LlamaRotaryEmbedding,
    apply_rotary_pos_emb,
    eager_attention_forward,
)


class ATPLlamaConfig(LlamaConfig):
    """A Llama config with one entry a layer in `layer_widths`.

    Each entry holds `kv_heads` (int; every KV group keeps all its query heads), `qk_pairs` (kept RoPE pair numbers, or
    None for all), `v_head_dim` (int) and `intermediate_size` (int). `head_dim`, `num_attention_heads` and
    `num_key_value_heads` stay the source model's: they fix the RoPE frequencies, the softmax scale
    1/sqrt(head_dim) and the number of query heads in a KV group. None for `layer_widths` means nothing was cut.
    """

    model_type = "atp_llama"
    layer_widths: list[dict[str, Any]] | None = None

    def widths(self, layer: int) -> dict[str, Any]:
        """The widths of one layer."""
        if self.layer_widths is not None:
            return self.layer_widths[layer]
        return {
            "kv_heads": self.num_key_value_heads,
            "qk_pairs": None,
            "v_head_dim": self.head_dim,
            "intermediate_size": self.intermediate_size,
        }


class ATPLlamaAttention(LlamaAttention):
    """Attention with its own head count, kept RoPE pairs and value dimension."""

    def __init__(self, config: ATPLlamaConfig, layer_idx: int) -> None:
        nn.Module.__init__(self)
        widths = config.widths(layer_idx)
        self.config = config
        self.layer_idx = layer_idx
        self.num_key_value_groups = config.num_attention_heads // config.num_key_value_heads
        self.scaling = config.head_dim**-0.5
        self.attention_dropout = config.attention_dropout
        self.is_causal = True
        pairs = widths["qk_pairs"]
        self.rope_dims = None if pairs is None else [*pairs, *(p + config.head_dim // 2 for p in pairs)]
        self.head_dim = config.head_dim if pairs is None else 2 * len(pairs)
        self.v_head_dim = widths["v_head_dim"]
        kv_heads, heads = widths["kv_heads"], widths["kv_heads"] * self.num_key_value_groups
        hidden, bias = config.hidden_size, config.attention_bias
        self.q_proj = nn.Linear(hidden, heads * self.head_dim, bias=bias)
        self.k_proj = nn.Linear(hidden, kv_heads * self.head_dim, bias=bias)
        self.v_proj = nn.Linear(hidden, kv_heads * self.v_head_dim, bias=bias)
        self.o_proj = nn.Linear(heads * self.v_head_dim, hidden, bias=bias)
        self._rope_index: Tensor | None = None

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        attention_mask: Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        # transformers 5.24 calls the cache `cache`, earlier releases `past_key_values`.
        caches = [kwargs.pop(name, None) for name in ("cache", "past_key_values")]
        cache = next((c for c in caches if c is not None), None)
        shape = hidden_states.shape[:-1]
        query = self.q_proj(hidden_states).view(*shape, -1, self.head_dim).transpose(1, 2)
        key = self.k_proj(hidden_states).view(*shape, -1, self.head_dim).transpose(1, 2)
        value = self.v_proj(hidden_states).view(*shape, -1, self.v_head_dim).transpose(1, 2)
        query, key = apply_rotary_pos_emb(query, key, *self._kept_rotation(position_embeddings))
        if cache is not None:
            key, value = cache.update(key, value, self.layer_idx)
        implementation = self.config._attn_implementation
        if implementation != "eager" and self.head_dim != self.v_head_dim:
            # Fused attention wants one head dimension; zeros change neither the scores nor the kept values.
            width = max(self.head_dim, self.v_head_dim)
            query, key, value = (F.pad(t, (0, width - t.shape[-1])) for t in (query, key, value))
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(implementation, eager_attention_forward)
        dropout = self.attention_dropout if self.training else 0.0
        output, weights = attend(
            self, query, key, value, attention_mask, dropout=dropout, scaling=self.scaling, **kwargs
        )
        output = output[..., : self.v_head_dim].reshape(*shape, -1)
        return self.o_proj(output), weights

    def _kept_rotation(self, position_embeddings: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        cos, sin = position_embeddings
        if self.rope_dims is None:
            return cos, sin
        if self._rope_index is None or self._rope_index.device != cos.device:
            self._rope_index = torch.tensor(self.rope_dims, device=cos.device)
        return cos[..., self._rope_index], sin[..., self._rope_index]


class ATPLlamaMLP(LlamaMLP):
    """Gated MLP with its own width."""

    def __init__(self, config: ATPLlamaConfig, layer_idx: int) -> None:
        nn.Module.__init__(self)
        self.config = config
        self.hidden_size = config.hidden_size
        self.intermediate_size = config.widths(layer_idx)["intermediate_size"]
        self.gate_proj = nn.Linear(self.hidden_size, self.intermediate_size, bias=config.mlp_bias)
        self.up_proj = nn.Linear(self.hidden_size, self.intermediate_size, bias=config.mlp_bias)
        self.down_proj = nn.Linear(self.intermediate_size, self.hidden_size, bias=config.mlp_bias)
        self.act_fn = ACT2FN[config.hidden_act]


class ATPLlamaDecoderLayer(LlamaDecoderLayer):
    """The stock layer around the two blocks above."""

    def __init__(self, config: ATPLlamaConfig, layer_idx: int) -> None:
        super(LlamaDecoderLayer, self).__init__()
        self.hidden_size = config.hidden_size
        self.self_attn = ATPLlamaAttention(config, layer_idx)
        self.mlp = ATPLlamaMLP(config, layer_idx)
        self.input_layernorm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_attention_layernorm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)


class ATPLlamaModel(LlamaModel):
    """The stock decoder stack over layers of different widths."""

    config_class = ATPLlamaConfig

    def __init__(self, config: ATPLlamaConfig) -> None:
        super(LlamaModel, self).__init__(config)
        self.padding_idx = config.pad_token_id
        self.vocab_size = config.vocab_size
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, self.padding_idx)
        self.layers = nn.ModuleList(ATPLlamaDecoderLayer(config, i) for i in range(config.num_hidden_layers))
        self.norm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.rotary_emb = LlamaRotaryEmbedding(config=config)
        self.gradient_checkpointing = False
        self.post_init()


class ATPLlamaForCausalLM(LlamaForCausalLM):
    """A cut causal LM: loads, generates and trains like any other transformers model."""

    config_class = ATPLlamaConfig

    def __init__(self, config: ATPLlamaConfig) -> None:
        super(LlamaForCausalLM, self).__init__(config)
        self.model = ATPLlamaModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()
