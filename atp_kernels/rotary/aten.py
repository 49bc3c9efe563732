"""Rotary position embedding in ATen calls, with its gradient derived by hand."""

import torch
from torch import Tensor

from atp_kernels.call import Call
from atp_kernels.rotary.definition import rotated


def supports(call: Call) -> str | None:
    """Every call."""
    return None


def forward(heads: list[Tensor], cos: Tensor, sin: Tensor, index: Tensor | None, width: int) -> list[Tensor]:
    """Each of some heads [batch, tokens, heads, D] rotated: [batch, heads, tokens, width]."""
    cos, sin = _taken(cos, sin, index)
    return [rotated(x, cos, sin, width) for x in heads]


def backward(grads: list[Tensor], cos: Tensor, sin: Tensor, index: Tensor | None, size: int) -> list[Tensor]:
    """The gradients [batch, tokens, heads, size] of what was rotated, from those of the results.

    With halves g1, g2 of a head's gradient: (g1 * cos1 + g2 * sin2, g2 * cos2 - g1 * sin1).
    """
    cos, sin = _taken(cos, sin, index)
    # The rotation with the other half's sine, backwards.
    sin = torch.cat([-half for half in reversed(sin.chunk(2, -1))], -1) if size else sin
    return [rotated(grad[..., :size].transpose(1, 2), cos, sin, size).transpose(1, 2).contiguous() for grad in grads]


def _taken(cos: Tensor, sin: Tensor, index: Tensor | None) -> tuple[Tensor, Tensor]:
    return (cos, sin) if index is None else (cos.index_select(-1, index), sin.index_select(-1, index))
