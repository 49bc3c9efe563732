"""The share of the decoder that a mask can keep under width rules: known from the model's shapes before a run."""

from __future__ import annotations

import bisect
import functools
import itertools
import math
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from atp.decide.budget import Budget

_CLOSE = 1e-5  # of the decoder: the search ends this close to the target


def nearest_share(budget: Budget, target: float, multiples: dict[str, int], *, blocks: bool = False) -> float:
    """The share of decoder parameters nearest to the target that `fit_mask`'s counts can keep, in (0, 1].

    multiples: as in `fit_mask`. blocks: whether whole blocks may go. Exact where none may, a decision saves the same
    whatever else is kept, a layer has two or three structures and all layers are equal; elsewhere the nearest share
    that filling structure after structure reaches.
    Stops early at a share within 1e-5 of the target.
    """
    additive = budget.separable and not blocks
    if additive and budget.space.equal_layers and len(budget.space.layer(0)) in (2, 3):
        return target + _nearest_sum(budget, target, multiples) / budget.total
    best = math.inf
    for order in itertools.permutations(structure.name for structure in budget.space.layer(0)):
        best = min(best, _nearest_filling(budget, target, multiples, order, blocks), key=abs)
        if abs(best) < _CLOSE * budget.total:
            break
    return target + best / budget.total


def _nearest_sum(budget: Budget, target: float, multiples: dict[str, int]) -> float:
    """Parameters of the nearest mask minus those of the target, for two or three structures whose costs add up."""
    layers, cost = budget.space.num_layers, budget.cost().double()
    sums, fixed = [], float(budget.total)
    for structure in budget.space.layer(0):
        each = float(cost[structure.start])
        counts = _sums(structure.size, structure.step(multiples), layers)
        sums.append(each * counts)
        fixed -= each * structure.size * layers
    # Try all sums of two structures, one value of the smaller at a time, and solve for the one with most counts.
    *others, finest = sorted(sums, key=len)
    wanted = target * budget.total - fixed
    few, many = others if len(others) == 2 else (np.zeros(1), others[0])
    best = sum(part[0] for part in sums) - wanted
    for one in few if best < 0 else ():  # the least that can be kept may be too much
        rest = wanted - one - many
        place = np.searchsorted(finest, rest)
        for side in (np.maximum(place - 1, 0), np.minimum(place, len(finest) - 1)):
            missed = finest[side] - rest
            best = min(best, missed[np.abs(missed).argmin()], key=abs)
        if abs(best) < _CLOSE * budget.total:
            break
    return float(best)


def _nearest_filling(
    budget: Budget, target: float, multiples: dict[str, int], order: tuple[str, ...], blocks: bool
) -> float:
    """Parameters kept minus those of the target when structures are filled in this order.

    Each structure gets, over all layers, as many blocks as the target allows; at the end one more block is added where
    that is nearer.
    """
    space = budget.space
    sizes = torch.tensor([structure.size for structure in space.structures], dtype=torch.float64)
    steps = torch.tensor([s.step(multiples) for s in space.structures], dtype=torch.float64)
    steps = steps.minimum(sizes).clamp_min(1)  # there is nothing of a block that a layer lacks
    fewest = (0 if blocks and structure.block is not None else structure.least for structure in space.structures)
    least = torch.tensor(list(fewest), dtype=torch.float64)
    counts = torch.minimum((least / steps).ceil() * steps, sizes)

    def missed(counts: Tensor) -> float:
        return float(budget.parameters(counts)) - target * budget.total

    def most_below(fill: Callable[[int], Tensor], most: int) -> Tensor:
        """Of fill(0), ..., fill(most) the last that does not exceed the target, by bisection; fill(0) if all do."""
        fitting = bisect.bisect_right(range(most + 1), 0.0, key=lambda blocks: missed(fill(blocks)))
        return fill(max(fitting - 1, 0))

    for name in order:
        own = torch.tensor([i for i, structure in enumerate(space.structures) if structure.name == name])
        more = len(own) * (math.ceil(float((sizes[own] / steps[own]).max())) - (0 if blocks else 1))
        counts = most_below(functools.partial(_filled, counts, own, steps, sizes), more)
    one_more = (torch.minimum(counts + steps * place, sizes) for place in torch.eye(len(counts)))
    return min(map(missed, (counts, *one_more)), key=abs)


def _filled(counts: Tensor, own: Tensor, steps: Tensor, sizes: Tensor, blocks: int) -> Tensor:
    """The counts with `blocks` more for the structures at the positions `own`, spread from the first layer on."""
    more = blocks // len(own) + (torch.arange(len(own)) < blocks % len(own))
    return counts.index_copy(0, own, torch.minimum(counts[own] + steps[own] * more, sizes[own]))


def _sums(size: int, multiple: int, layers: int) -> np.ndarray:
    """The possible sums of a structure's kept counts over all layers, ascending, int64."""
    blocks = size // multiple
    reached = np.zeros(layers * size + 1, dtype=bool)
    # A structure kept whole may end in a smaller block, in any number of layers.
    for whole in range(layers + 1) if size % multiple else (0,):
        first = whole * size + (layers - whole) * multiple
        last = whole * size + (layers - whole) * multiple * blocks
        reached[first : last + 1 : multiple] = True
    return np.flatnonzero(reached)
