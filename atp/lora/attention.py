"""Attention of transformers' own classes with fused RoPE and projections, in models with masked LoRA layers."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import eager_attention_forward

from atp.lora.stock import runs_stock_forward
from atp.models.attention import fuses, project, rotate


class FusedAttention(nn.Module):
    """Placed before the class of a stock attention, whose forward it takes over where no cache is filled.

    The families of `atp.families` compute what is here, with these differences between their classes: norms of queries
    and keys, layers without RoPE, the place of the sliding window, and a dropout after the last linear. Their own
    forward runs for the latter, with a cache, and where attention is not fused.
    """

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        attention_mask: Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """As the stock class does; hidden_states [batch, tokens, hidden]."""
        module: Any = self
        caches = [kwargs.get(name) for name in ("cache", "past_key_values")]
        ordinary = position_embeddings is not None and getattr(module, "use_rope", True)
        ordinary &= not getattr(module, "residual_dropout", 0)
        if position_embeddings is None or not ordinary or caches != [None, None] or not fuses(hidden_states):
            own = {"position_embeddings": position_embeddings, "attention_mask": attention_mask}
            result: tuple[Tensor, Tensor | None] = super().forward(hidden_states, **own, **kwargs)
            return result
        for name in ("cache", "past_key_values"):
            kwargs.pop(name, None)
        tokens = hidden_states.shape[:-1]
        query, key, value = (states.view(*tokens, -1, module.head_dim) for states in project(module, hidden_states))
        if hasattr(module, "q_norm"):
            query, key = module.q_norm(query), module.k_norm(key)
        query, key = rotate(query, key, position_embeddings)
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(module.config._attn_implementation, eager_attention_forward)
        output, weights = attend(
            module,
            query,
            key,
            value.transpose(1, 2),
            attention_mask,
            dropout=module.attention_dropout if module.training else 0.0,
            scaling=module.scaling,
            sliding_window=getattr(module, "sliding_window", getattr(module.config, "sliding_window", None)),
            **kwargs,
        )
        return module.o_proj(output.reshape(*tokens, -1)), weights


def fuse_attention(attention: nn.Module) -> None:
    """Gives a stock attention the forward of `FusedAttention`, in place: same object, parameters and hooks."""
    if runs_stock_forward(attention):
        attention.__class__ = _fused(type(attention))


def unfuse_attention(attention: nn.Module) -> None:
    """Gives an attention its own forward back."""
    if isinstance(attention, FusedAttention):
        attention.__class__ = type(attention).__mro__[2]


_FUSED: dict[type[nn.Module], type[nn.Module]] = {}
"""The class that stands for each stock one."""


def _fused(kind: type[nn.Module]) -> type[nn.Module]:
    if kind not in _FUSED:
        _FUSED[kind] = type(f"Fused{kind.__name__}", (FusedAttention, kind), {"__module__": __name__})
    return _FUSED[kind]
