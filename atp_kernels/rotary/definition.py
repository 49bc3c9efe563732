"""Rotary position embedding in plain PyTorch: the definition every backend is held to."""

import torch
from torch import Tensor
from torch.nn.functional import pad


def rotary_embedding(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, index: Tensor | None = None, width: int | None = None
) -> tuple[Tensor, Tensor]:
    """x * cos + rotate_half(x) * sin of q and k [batch, tokens, heads, D], as [batch, heads, tokens, width].

    rotate_half(x) = (-x2, x1) for the halves x1, x2 of a head (Su et al. 2021, as in Llama). index [D]: which of the
    angles' positions each dimension takes. Dimensions from D to width are zero.
    """
    if index is not None:
        cos, sin = cos.index_select(-1, index), sin.index_select(-1, index)
    return rotated(q, cos, sin, width), rotated(k, cos, sin, width)


def rotated(x: Tensor, cos: Tensor, sin: Tensor, width: int | None) -> Tensor:
    """One of both, with cos and sin [batch or 1, tokens, D]."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    first, second = wide.chunk(2, -1) if x.shape[-1] else (wide, wide)
    turned = torch.cat((-second, first), -1)[..., : x.shape[-1]]
    y = (wide * cos.unsqueeze(2) + turned * sin.unsqueeze(2)).to(x.dtype).transpose(1, 2)
    return y if width is None else pad(y, (0, width - x.shape[-1]))
