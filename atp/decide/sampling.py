"""From logits to masks: Gumbel-sigmoid samples and straight-through hard masks."""

from __future__ import annotations

import torch
from torch import Tensor

from atp.spaces.space import MaskSpace

_TINY = 1e-9


def gumbel_noise(size: int, generator: torch.Generator) -> Tensor:
    """Standard Gumbel noise -log(-log(u)), float32 [size] (docs/method.md section 2)."""
    uniform = torch.rand(size, generator=generator).clamp(_TINY, 1 - 1e-7)
    return -torch.log(-torch.log(uniform))


def logistic_noise(size: int, generator: torch.Generator) -> Tensor:
    """Zero-centred logistic noise log(u / (1 - u)), float32 [size]: the difference of two Gumbel draws."""
    uniform = torch.rand(size, generator=generator).clamp(1e-7, 1 - 1e-7)
    return torch.log(uniform) - torch.log1p(-uniform)


def soft_mask(logits: Tensor, offset: Tensor | float, temperature: float, noise: Tensor | None = None) -> Tensor:
    """s = sigmoid((logits + noise + offset) / temperature), float32 [size] in (0, 1), differentiable in the logits."""
    shifted = logits + offset if noise is None else logits + noise + offset
    return torch.sigmoid(shifted / temperature)


def keep_one(mask: Tensor, logits: Tensor, space: MaskSpace) -> Tensor:
    """The bool mask [size] with the largest logits of every structure kept, as many as it keeps at least.

    One for most structures, so that none becomes empty. Of equal logits the first are kept. Where all logits of a
    structure are minus infinity, none of it is kept.
    """
    if any(structure.least > 1 for structure in space.structures):
        return _keep_least(mask, logits, space)
    owner, last = space.structure_of.to(logits.device), space.size - 1
    largest = logits.new_full((len(space.structures),), -torch.inf).scatter_reduce(0, owner, logits, "amax")
    place = torch.arange(space.size, device=logits.device)
    places = torch.where(logits == largest[owner], place, last)
    first = places.new_full(largest.shape, last).scatter_reduce(0, owner, places, "amin")
    return mask | (place == first[owner]) & (largest[owner] > -torch.inf)


def _keep_least(mask: Tensor, logits: Tensor, space: MaskSpace) -> Tensor:
    order = logits.argsort(descending=True, stable=True)
    owner = space.structure_of.to(logits.device)
    order = order[owner[order].argsort(stable=True)]  # structure by structure, the largest logit first
    starts, least = (
        torch.tensor([getattr(structure, key) for structure in space.structures], device=logits.device)
        for key in ("start", "least")
    )
    rank = torch.arange(space.size, device=logits.device) - starts[owner]
    return mask.index_put((order,), mask[order] | (rank < least[owner]))


def hard_mask(logits: Tensor, soft: Tensor, space: MaskSpace) -> Tensor:
    """m = 1[s >= 0.5], bool [size], never empty in any structure."""
    return keep_one(soft.detach() >= 0.5, logits.detach(), space)


def straight_through(soft: Tensor, hard: Tensor) -> Tensor:
    """The value of the hard mask with the gradient of the soft one, float32 [size]."""
    return hard.to(soft.dtype) + (soft - soft.detach())
