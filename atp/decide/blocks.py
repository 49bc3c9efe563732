"""Which whole blocks go: an attention or MLP that costs less per parameter than what else could be removed.

A group is worth w = F c^(1 - a) to the rule that ranks by F / c^a, and a block W = F_block c^(1 - a), with F_block the
Fisher saliency of one mask value on all of it: the square of a sum is not the sum of squares. Emptying a block of which
k groups are trimmed already costs what is left of W, and saves its other groups, its norms and its last bias. At a rate
of r per parameter groups with w < r c go, and so does a block whose own rate (`rates`) is below r
(docs/method.md section 6).
"""

from __future__ import annotations

import torch
from torch import Tensor

from atp.config import DecisionsConfig
from atp.decide.budget import Budget
from atp.decide.fit import fit_mask
from atp.decide.rules import width_rules

_MISSED = 2e-3  # of the decoder, which whole blocks may remove beyond the target
_RATES = 1024  # at which a set of blocks is judged
_OUT_OF_REACH = 1e100
_AT_ONCE = 1024  # sets
_BETTER = 1 - 1e-6  # by less is rounding


def fit_with_blocks(logits: Tensor, saliency: Tensor, budget: Budget, config: DecisionsConfig) -> Tensor:
    """As `fit_mask`, without the blocks that together with what is trimmed beside them cost least.

    saliency: as for `worths`. Sets are judged by what they cost when all other groups below one rate go too, the rate
    that meets the target. The first is the best of those that take blocks in the order of `rates`; then the best change
    of one block, or exchange of two, is made until none helps.
    """
    target = config.target_keep
    multiples = width_rules(budget, target, config.multiples, blocks=True)
    worth, whole = worths(saliency, budget, config)
    price = _Price(worth, whole, budget, multiples, target)
    rate = rates(worth, whole, budget)
    may_go = rate.isfinite()
    place = rate.argsort(stable=True).argsort()
    numbers = torch.arange(int(may_go.sum()) + 1)
    chosen, least = price.cheapest((place < numbers[:, None]) & may_go)
    alone = torch.eye(len(rate), dtype=torch.bool)[may_go]
    pairs = torch.combinations(torch.arange(len(alone)))
    changes = torch.cat([alone, alone[pairs[:, 0]] | alone[pairs[:, 1]]])
    while True:
        changed, found = price.cheapest(chosen ^ changes)
        if found >= _BETTER * least:
            return fit_mask(logits, target, budget, multiples, chosen)
        chosen, least = changed, found


def worths(saliency: Tensor, budget: Budget, config: DecisionsConfig) -> tuple[Tensor, Tensor]:
    """What removing each decision costs, float64 [size], and each structure as a whole, [structures].

    saliency: [size + structures], as `atp.decide.saliency.squares` orders it.
    """
    saliency, cost, space = saliency.detach().cpu().double(), budget.cost().cpu().double(), budget.space
    scale = cost ** (1 - config.cost_exponent)
    starts = torch.tensor([min(structure.start, space.size - 1) for structure in space.structures])
    return saliency[: space.size] * scale, saliency[space.size :] * scale[starts]


def rates(worth: Tensor, whole: Tensor, budget: Budget) -> Tensor:
    """The rate per parameter from which on each block goes as a whole, float64 [structures]; infinite where it may not.

    It is the highest, over the numbers k of its cheapest groups that are trimmed first, of (W - w_1 - ... - w_k) per
    parameter of the rest: from there on no way of keeping a part of the block is cheaper.
    """
    found = []
    cost, besides = budget.cost().cpu().double(), budget.with_block().cpu()
    for structure, all_of_it, more in zip(budget.space.structures, whole, besides, strict=True):
        if structure.block is None or not structure.size:
            found.append(torch.inf)
            continue
        trimmed = torch.cat([worth.new_zeros(1), worth[structure.span].sort().values.cumsum(0)])
        rest = float(cost[structure.start]) * torch.arange(structure.size, -1, -1, dtype=torch.float64) + more
        found.append(float(((all_of_it - trimmed) / rest.clamp_min(torch.finfo(torch.float32).tiny)).max()))
    return torch.tensor(found, dtype=torch.float64)


class _Price:
    """What sets of blocks cost with all that is trimmed beside them, so that the budget is met."""

    def __init__(self, worth: Tensor, whole: Tensor, budget: Budget, multiples: dict[str, int], target: float) -> None:
        cost, structures = budget.cost().cpu().double(), budget.space.structures
        self._needed, self._allowed = (1 - target) * budget.total, _MISSED * budget.total
        density = (worth / cost).sort().values
        steps = torch.linspace(0, len(density) - 1, min(_RATES, len(density))).long()
        at = torch.cat([density.new_zeros(1), density[steps], density.new_full((1,), torch.inf)])
        saved, paid = [], []  # of each structure, with the groups trimmed that are cheaper than each rate
        for structure in structures:
            own = worth[structure.span].sort().values
            each = float(cost[structure.start]) if structure.size else 1.0
            most = structure.size - min(structure.step(multiples), structure.size)
            count = torch.searchsorted(own / each, at).clamp_max(most)
            saved.append(each * count.double())
            paid.append(torch.cat([own.new_zeros(1), own.cumsum(0)])[count])
        self._saved, self._paid, self._whole = torch.stack(saved), torch.stack(paid), whole
        counts = torch.tensor([float(structure.size) for structure in structures], dtype=torch.float64)
        starts = torch.tensor([min(structure.start, budget.space.size - 1) for structure in structures])
        self._all = counts * cost[starts] + budget.with_block().cpu()
        self._there = counts > 0

    def cheapest(self, sets: Tensor) -> tuple[Tensor, float]:
        """The set that costs least, bool [structures], and what it costs; sets bool [sets, structures].

        Those that leave more or less of the model than is asked for cost more than any other, by how much they do, and
        no block at all an infinite sum.
        """
        prices = torch.cat([self._of(some) for some in sets.split(_AT_ONCE)])
        index = int(prices.argmin())
        return sets[index], float(prices[index])

    def _of(self, sets: Tensor) -> Tensor:
        trimmed, gone = (~sets).double(), sets.double()
        saved = trimmed @ self._saved + (gone @ self._all)[:, None]
        paid = trimmed @ self._paid + (gone @ self._whole)[:, None]
        # The first rate that saves enough, or the last one.
        enough = (saved < self._needed).sum(1, keepdim=True).clamp_max(saved.shape[1] - 1)
        before = (enough - 1).clamp_min(0)
        (s0, s1), (p0, p1) = ((part.gather(1, before), part.gather(1, enough)) for part in (saved, paid))
        share = ((self._needed - s0) / (s1 - s0).clamp_min(1e-9)).clamp(0, 1)
        price = (p0 + share * (p1 - p0)).squeeze(1)
        missed = torch.maximum(self._needed - saved[:, -1], saved[:, 0] - self._needed)
        price = torch.where(missed > self._allowed, _OUT_OF_REACH * missed, price)
        return price.masked_fill((sets | ~self._there).all(1), torch.inf)
