"""Attention of transformers' own classes with fused RoPE and projections, in models with masked LoRA layers."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from transformers.cache_utils import Cache

from atp.lora.stock import Hooked, runs_stock_forward
from atp.models.attention import attend_packed, fuses, packed_projections
from atp.models.cut import CutAttention, place_before


class FusedAttention(CutAttention, Hooked):
    """Placed before the class of a stock attention, whose forward it takes over where no cache is filled.

    The stock forward runs with a cache, on layers without RoPE, with a dropout after the last linear, and where
    attention is not fused.
    """

    pads = False

    @property
    def plain(self) -> bool:
        """Whether queries and keys have RoPE, and outputs no dropout."""
        return getattr(self, "use_rope", True) and not getattr(self, "residual_dropout", 0)

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: Any = None,
        attention_mask: Tensor | None = None,
        cache: Cache | None = None,
        past_key_values: Cache | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """As the stock class does; hidden_states [batch, tokens, hidden]."""
        ordinary = position_embeddings is not None and cache is None and past_key_values is None and self.plain
        packed = attend_packed(self, hidden_states, position_embeddings, attention_mask) if ordinary else None
        if packed is not None:
            return packed, None
        own = {"position_embeddings": position_embeddings, "attention_mask": attention_mask}
        if ordinary and (fuses(hidden_states) or packed_projections(self, hidden_states) is not None):
            return super().forward(hidden_states, **own, **kwargs)
        caches = {"cache": cache, "past_key_values": past_key_values}
        own |= {name: given for name, given in caches.items() if given is not None}
        stock: Any = super(CutAttention, self)
        result: tuple[Tensor, Tensor | None] = stock.forward(hidden_states, **own, **kwargs)
        return result


def fuse_attention(attention: nn.Module) -> None:
    """Gives a stock attention the forward of `FusedAttention`, in place: same object, parameters and hooks."""
    norm: Any = getattr(attention, "q_norm", None)
    over_heads = norm is not None and norm.weight.numel() != attention.head_dim  # ours norms head by head
    if runs_stock_forward(attention) and not over_heads:
        place_before(attention, FusedAttention)


def unfuse_attention(attention: nn.Module) -> None:
    """Gives an attention its own forward back."""
    if isinstance(attention, FusedAttention):
        attention.__class__ = type(attention).__bases__[1]
