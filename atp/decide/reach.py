"""Which shares of the decoder whole blocks can keep at all: known from the model's shapes, before anything runs."""

from __future__ import annotations

import numpy as np

from atp.decide.budget import Budget

_CLOSE = 1e-5  # of the decoder: a share this near the target is as good as the target


def nearest_share(budget: Budget, target: float, multiples: dict[str, int]) -> float:
    """The share of decoder parameters nearest to the target that `fit_mask`'s counts can keep, in (0, 1].

    multiples: as in `fit_mask`. Right for spaces in which a decision costs the same whatever else is kept and all
    layers are alike, as in both of ours. Stops early at a share within 1e-5 of the target.
    """
    layers, cost = budget.space.num_layers, budget.cost().double()
    sums, fixed = [], float(budget.total)
    for structure in budget.space.layer(0):
        each = float(cost[structure.start])
        counts = _sums(structure.size, multiples.get(structure.name, 1), layers)
        sums.append(each * counts)
        fixed -= each * structure.size * layers
    # All sums of two structures are tried, a few of one at a time; the structure with most counts is solved for.
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
    return target + float(best) / budget.total


def _sums(size: int, multiple: int, layers: int) -> np.ndarray:
    """What the kept counts of a structure can add up to over all layers, ascending, int64."""
    blocks = size // multiple
    reached = np.zeros(layers * size + 1, dtype=bool)
    # A layer that is kept whole may end in a smaller block: any number of them may.
    for whole in range(layers + 1) if size % multiple else (0,):
        first = whole * size + (layers - whole) * multiple
        last = whole * size + (layers - whole) * multiple * blocks
        reached[first : last + 1 : multiple] = True
    return np.flatnonzero(reached)
