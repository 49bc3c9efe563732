"""Masks of methods that rank inside a layer: every layer loses the same share, lowest scores first."""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import Tensor

from atp.decide.budget import Budget
from atp.decide.rules import width_rules
from atp.ground.errors import InputError, NotReached
from atp.processes.finite import is_finite
from atp.spaces.space import Structure


def uniform_mask(
    scores: Tensor,
    target: float,
    budget: Budget,
    multiples: dict[str, int] | None,
    layers: Collection[int] | None = None,
) -> Tensor:
    """The highest scores of each structure, with equal counts in all layers and `target` of the decoder kept.

    scores [space.size]; multiples: as in `fit_mask`; layers: those that may lose anything (None: all). All structures
    but one keep the count nearest to the uniform share. The one that the space marks makes up the remainder: in some
    layers it is one block wider than in others, so that the budget holds to one block. Where layers differ in size
    already, one that has fewer than this count keeps all of them. Returns bool [space.size].
    Raises `InputError` when these layers cannot lose that much, `NotReached` for scores that are not finite.
    """
    if not is_finite(scores):
        raise NotReached("scores of what to remove hold NaN or infinity: use model.dtype=float32, or other data")
    space, multiples = budget.space, width_rules(budget, target, multiples)
    free = [s for s in space.structures if layers is None or s.layer in layers]
    share = _uniform_share(free, target, budget)
    steps = [s.step(multiples) for s in free]
    counts = [min(max(round(share * s.size / step), 1) * step, s.size) for s, step in zip(free, steps, strict=True)]
    rest = [i for i, structure in enumerate(free) if structure.remainder]
    widest, step = max(free[index].size for index in rest), steps[rest[0]]
    blocks, fewest = len(rest), -(-free[rest[0]].least // step)

    def mask_with(extra: int) -> Tensor:
        """The mask with the fewest blocks of the remainder per layer and `extra` more, from the first layer on."""
        for number, index in enumerate(rest):
            counts[index] = min((fewest + extra // blocks + (number < extra % blocks)) * step, free[index].size)
        mask = torch.ones(space.size, dtype=torch.bool)
        for structure, count in zip(free, counts, strict=True):
            kept = structure.ranking(scores[structure.span])[:count]
            mask[structure.span] = False
            mask[structure.start + kept.cpu()] = True
        return mask

    if budget.share(mask_with(0)) > target:
        raise InputError(
            f"decisions.target_keep {target} is out of reach when only {blocks} of {space.num_layers} layers may be "
            "pruned and each keeps something: raise it"
        )
    low, high = 0, blocks * (-(-widest // step) - fewest)
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if budget.share(mask_with(middle)) <= target else (low, middle - 1)
    nearest = min((low, low + 1), key=lambda extra: abs(budget.share(mask_with(extra)) - target))
    return mask_with(nearest)


def _uniform_share(free: list[Structure], target: float, budget: Budget) -> float:
    """The share of every free structure that keeps `target` of the decoder if counts need not be whole."""
    mask = torch.ones(budget.space.size, dtype=torch.float64)

    def kept(share: float) -> float:
        for structure in free:
            mask[structure.span] = share
        return budget.share(mask)

    low, high = 0.0, 1.0
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (middle, high) if kept(middle) <= target else (low, middle)
    return low
