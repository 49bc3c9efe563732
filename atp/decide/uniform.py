"""Decisions with the same count of a structure in every layer, so that one set of widths describes the whole model."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from atp.decide.budget import Budget
from atp.decide.fit import exact_offset
from atp.ground.errors import InputError, NotReached
from atp.processes.finite import is_finite
from atp.spaces.space import MaskSpace, Structure


def require_equal_layers(space: MaskSpace) -> None:
    """Raises `InputError` for a model that is cut already and whose layers differ in width."""
    if not space.equal_layers:
        raise InputError(
            "decisions.uniform keeps equal counts in all layers, but the layers of this model differ in width already: "
            "set decisions.uniform=false, or give the model that it was cut from"
        )


def equal_ranks(logits: Tensor, space: MaskSpace) -> Tensor:
    """Replaces each logit by the mean, over all layers, of the logits at its rank: float [size], differentiable.

    The order inside a layer stays. Logits of one rank are equal in all layers, and in all groups of a structure, so any
    threshold keeps the same count of it in every layer.
    """
    places, ranked = [], []
    for index, structure in enumerate(space.layer(0)):
        own = _by_layer(space, index, logits.device).reshape(-1, structure.size // structure.groups)
        values, order = logits[own].sort(dim=1, descending=True, stable=True)
        places.append(own.gather(1, order).flatten())
        ranked.append(values.mean(0).expand_as(values).flatten())
    return torch.zeros_like(logits).index_put((torch.cat(places),), torch.cat(ranked))


def fit_equal(logits: Tensor, target: float, budget: Budget, multiples: dict[str, int]) -> Tensor:
    """The noise-free decision with equal counts in all layers that meets the budget to half a block, bool [size].

    logits float [size]; target: share of decoder parameters; multiples: structure name -> number that its count must be
    a multiple of (default 1) unless it is kept whole. Of all counts that are near enough those win whose logits, each
    times what it costs, are furthest above the threshold that would meet the budget exactly. Raises `NotReached` for
    logits that are not finite.
    """
    logits, space = logits.detach().cpu(), budget.space
    if not is_finite(logits):
        raise NotReached("the logits of the decisions hold NaN or infinity: start again with a lower decisions.lr")
    equal = equal_ranks(logits, space)
    above, cost = equal + exact_offset(equal, target, budget), budget.cost()
    # What keeping the first n of a structure in one layer is worth, for n = 0, 1, ...
    worth = [
        torch.cat([torch.zeros(1), (above * cost)[s.span][s.ranking(above[s.span])].cumsum(0)]) for s in space.layer(0)
    ]
    found = equal_counts(budget, target, multiples)
    near = [counts for counts in found if abs(share_of(budget, counts) - target) <= half_block(budget, multiples)]
    near = near or [min(found, key=lambda counts: abs(share_of(budget, counts) - target))]
    best = max(near, key=lambda counts: sum(float(w[n]) for w, n in zip(worth, counts, strict=True)))
    mask = torch.zeros(space.size, dtype=torch.bool)
    for structures, count in zip(space.by_name().values(), best, strict=True):
        for structure in structures:
            mask[structure.start + structure.ranking(logits[structure.span])[:count]] = True
    return mask


def equal_counts(budget: Budget, target: float, multiples: dict[str, int]) -> list[tuple[int, ...]]:
    """Counts of the structures of a layer that may be meant by the target, the same in all layers.

    For each count of the first structure, that of the second with the share nearest to the target. For spaces with two
    structures, of which the second has finer blocks, or with one.
    """
    coarse, *others = (_allowed(s, s.step(multiples)) for s in budget.space.layer(0))
    if not others:
        return [(count,) for count in coarse]
    (fine,) = others
    return [
        min(((first, second) for second in fine), key=lambda counts: abs(share_of(budget, counts) - target))
        for first in coarse
    ]


def share_of(budget: Budget, counts: tuple[int, ...]) -> float:
    """The share of decoder parameters that is kept when every layer keeps these counts of its structures."""
    return float(budget.parameters(torch.tensor(counts).double().repeat(budget.space.num_layers)) / budget.total)


def half_block(budget: Budget, multiples: dict[str, int]) -> float:
    """Half of what one block of the finer structure saves in all layers, as a share of the decoder parameters."""
    fine = budget.space.layer(0)[-1]
    return fine.step(multiples) * float(budget.cost()[fine.start]) * budget.space.num_layers / budget.total / 2


def _allowed(structure: Structure, multiple: int) -> list[int]:
    blocks = range(math.ceil(structure.least / multiple), math.ceil(structure.size / multiple) + 1)
    return [min(block * multiple, structure.size) for block in blocks]


def _by_layer(space: MaskSpace, index: int, device: torch.device) -> Tensor:
    """The positions of one structure's decisions in the flat vector, int64 [layers, size]."""
    structure, all_of_a_layer = space.layer(0)[index], space.size // space.num_layers
    first = torch.arange(space.num_layers, device=device) * all_of_a_layer + structure.start
    return first[:, None] + torch.arange(structure.size, device=device)
