"""The widths that a cut model may have when the config leaves them open."""

from __future__ import annotations

import torch

from atp.decide.budget import Budget

_COARSEST = 0.002  # of the decoder; the fit then ends within half of it


def width_rules(budget: Budget, target: float, multiples: dict[str, int] | None) -> dict[str, int]:
    """For a structure name, the number that its kept counts must be multiples of; structures without one may have any.

    multiples: the config's, taken as they are. None leaves it to space and model: a structure that prefers multiples
    gets the first of them that divides its size and keeps the target share in reach. In reach: one block is at most
    0.2 % of the decoder, and one block in every layer leaves room for the target.
    """
    if multiples is not None:
        return multiples
    rules: dict[str, int] = {}
    cost = budget.cost()
    for structure in budget.space.layer(0):
        share = float(cost[structure.start]) / budget.total
        for step in structure.multiples:
            wider = rules | {structure.name: step}
            if structure.size % step == 0 and step * share <= _COARSEST and _least(budget, wider) <= target:
                rules = wider
                break
    return rules


def _least(budget: Budget, rules: dict[str, int]) -> float:
    """The least share of the decoder that one block in every structure keeps."""
    mask = torch.zeros(budget.space.size, dtype=torch.bool)
    for structure in budget.space.structures:
        mask[structure.start : structure.start + rules.get(structure.name, 1)] = True
    return budget.share(mask)
