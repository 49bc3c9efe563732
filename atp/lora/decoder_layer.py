"""Decoder layers that join what lies between their blocks: residual connections and norms.

In a short training step on a CPU each block is one call with the norm before it and the residual connection after it.
Elsewhere the residual connection after attention and the norm after it are one operation. The connection after the MLP
is not joined with the next layer's norm: a layer returns the stream, whose reader it does not know.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from atp.families import BLOCKS
from atp.lora.stock import Hooked, runs_stock_forward
from atp.models.attention import attend_packed
from atp.models.cut import place_before
from atp.models.layers import add_block, mlp_output, residual_multiplier
from atp_kernels import add_rms_norm, rms_norm
from atp_kernels.packed.op import Norm


class FusedRMSNorm(Hooked):
    """Replaces an RMSNorm of a decoder layer: one pass each way, and a result in the dtype that autocast asks for.

    Otherwise each of the linears that read the result would cast it, and its gradient on the way back. offset: whether
    it multiplies by 1 + weight, as Gemma's does.
    """

    offset = False

    def __init__(self, norm: Any, *, offset: bool = False) -> None:
        super().__init__()
        self.weight: nn.Parameter = norm.weight
        self.variance_epsilon: float = norm.eps if offset else norm.variance_epsilon
        self.offset = offset
        self._scale: tuple[Tensor, int, Tensor] | None = None
        self.train(norm.training)

    @classmethod
    def adopt(cls, norm: nn.Module) -> None:
        """Turns a norm into this one in place, for a sharded model, whose gathering knows its modules."""
        norm.__class__ = cls

    @property
    def scale(self) -> Tensor:
        """What it multiplies by, [hidden]; 1 + weight in float32, made anew where the weight has changed."""
        weight = self.weight
        if not self.offset:
            return weight
        if weight.requires_grad:
            return 1.0 + weight.float()
        if self._scale is None or self._scale[0] is not weight or self._scale[1] != weight._version:
            self._scale = weight, weight._version, 1.0 + weight.detach().float()
        return self._scale[2]

    def forward(self, x: Tensor) -> Tensor:
        if x.ndim == 4 and not x.is_contiguous() and x.transpose(1, 2).is_contiguous():
            # Gemma norms heads behind each other; what lies token by token stays so, and attention copies nothing.
            turned: Tensor = self.forward(x.transpose(1, 2))
            return turned.transpose(1, 2)
        if x.dtype == torch.float64:
            # transformers normalizes in float32 whatever the dtype, and so does every model to compare with.
            x = x.float()
            normed = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.variance_epsilon)
            return (self.scale * normed).double() if self.offset else self.scale * normed.double()
        return rms_norm(x, self.scale, eps=self.variance_epsilon, dtype=_read_in(x))

    def after(self, x: Tensor, output: Tensor, multiplier: float) -> tuple[Tensor, Tensor]:
        """(x + multiplier * output, this norm of it), [..., hidden], as one operation if nobody waits for a call."""
        if self.hooked or torch.float64 in (x.dtype, output.dtype):
            stream = x + (output if multiplier == 1 else output * multiplier)
            return stream, self(stream)
        eps, dtype = self.variance_epsilon, _read_in(x)
        return add_rms_norm(x, output, self.scale, eps=eps, multiplier=multiplier, dtype=dtype)


def _read_in(x: Tensor) -> torch.dtype | None:
    """The dtype in which linears read the norm of x: autocast's, None for that of the residual stream."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None


class FusedLayer(nn.Module):
    """Placed before the class of a decoder layer x + m * block(norm(x)); m: `residual_multiplier`."""

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """As the stock class does; hidden_states [batch, tokens, hidden]."""
        layer: Any = self
        second = layer.post_attention_layernorm
        x = None if args else self._attended(hidden_states, **kwargs)
        if x is None and (args or type(second) is not FusedRMSNorm):
            stock: Any = super()
            result: Tensor = stock.forward(hidden_states, *args, **kwargs)
            return result
        if x is None:
            given = {"attention_mask": None, **kwargs, "hidden_states": layer.input_layernorm(hidden_states)}
            output, _ = layer.self_attn(**given)
            x, normed = second.after(hidden_states, output, residual_multiplier(layer))
            return add_block(layer, x, mlp_output(layer.mlp, normed))
        norm = self._norm("post_attention_layernorm", "mlp", x)
        y = None if norm is None else layer.mlp.packed(x, norm)
        return x + layer.mlp(second(x)) if y is None else y

    def _attended(
        self,
        x: Tensor,
        attention_mask: Tensor | None = None,
        position_embeddings: Any = None,
        cache: Any = None,
        past_key_values: Any = None,
        **_: Any,
    ) -> Tensor | None:
        """x + attention(norm(x)) where packs take it, else None."""
        layer: Any = self
        attention, norm = layer.self_attn, self._norm("input_layernorm", "self_attn", x)
        if norm is None or position_embeddings is None or cache is not None or past_key_values is not None:
            return None
        return attend_packed(attention, x, position_embeddings, attention_mask, norm) if attention.plain else None

    def _norm(self, name: str, block: str, x: Tensor) -> Norm | None:
        """Weight and eps of the norm before a block, where both are ours and nobody waits for a call of either."""
        norm, module = getattr(self, name), getattr(self, block)
        if type(norm) is not FusedRMSNorm or norm.hooked or not isinstance(module, Hooked) or module.hooked:
            return None
        if x.dtype != torch.float32 or not torch.is_grad_enabled() or residual_multiplier(self) != 1:
            return None
        weight = norm.weight
        if type(weight) is not nn.Parameter or weight.dtype != torch.float32 or weight.requires_grad:
            return None
        return weight, norm.variance_epsilon


def fuse_layer(layer: nn.Module) -> None:
    """Gives a stock decoder layer x + m * block(norm(x)) the forward of `FusedLayer`, in place."""
    names = (name for block in BLOCKS for name in (block.module, str(block.before)))
    if runs_stock_forward(layer) and all(hasattr(layer, name) for name in names):
        place_before(layer, FusedLayer)


def unfuse_layer(layer: nn.Module) -> None:
    """Gives a decoder layer its own forward back."""
    if isinstance(layer, FusedLayer):
        layer.__class__ = type(layer).__bases__[1]
