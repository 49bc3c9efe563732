"""The widths that a cut model may have when the config leaves them open."""

from __future__ import annotations

import math

import torch

from atp.decide.budget import Budget

_COARSEST = 0.002  # of the decoder; the fit then ends within half of it


def width_rules(
    budget: Budget,
    target: float,
    multiples: dict[str, int] | None,
    device: str | None = None,
    *,
    blocks: bool = False,
) -> dict[str, int]:
    """For a structure name, the number that its kept counts must be multiples of; structures without one may have any.

    multiples: the config's, taken as they are. None leaves it to space and model: a structure that prefers multiples
    gets the first of them that divides its size in all layers and keeps the target share in reach. In reach: one block
    is at most 0.2 % of the decoder, and one block in every layer leaves room for the target; with blocks none where all
    of a structure may go. device: the type of the one that the model trains on, `cuda` or another, None for that of
    this machine; on CUDA what suits its matrix products comes first.
    """
    if multiples is not None:
        return multiples
    on_cuda = device == "cuda" if device else torch.cuda.is_available()
    rules: dict[str, int] = {}
    cost = budget.cost()
    for name, layers in budget.space.by_name().items():
        share = max(float(cost[structure.start]) for structure in layers) / budget.total
        for step in (*(layers[0].cuda_multiples if on_cuda else ()), *layers[0].multiples):
            wider = rules | {name: step}
            divides = all(structure.size % structure.step(wider) == 0 for structure in layers)
            if divides and layers[0].step(wider) * share <= _COARSEST and _least(budget, wider, blocks) <= target:
                rules = wider
                break
    return rules


def _least(budget: Budget, rules: dict[str, int], blocks: bool) -> float:
    """The least share of the decoder that one block in every structure keeps, or in every one that may not go."""
    mask = torch.zeros(budget.space.size, dtype=torch.bool)
    for structure in budget.space.structures:
        if blocks and structure.block is not None:
            continue
        step = structure.step(rules)
        mask[structure.start : structure.start + math.ceil(structure.least / step) * step] = True
    return budget.share(mask)
