"""Masks that meet a budget exactly: by an offset on all logits during search, by a fit with width rules at the freeze.

See docs/method.md sections 4 to 6.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from atp.decide.budget import Budget
from atp.decide.rules import width_rules
from atp.decide.sampling import keep_one
from atp.ground.errors import NotReached
from atp.processes.finite import is_finite
from atp.spaces.space import MaskSpace


def exact_offset(logits: Tensor, share: float, budget: Budget) -> Tensor:
    """The offset b for which the mask 1[logits + b >= 0] keeps just under `share` of the decoder parameters.

    A scalar tensor, found by bisection over the sorted logits: -b is one of them, so the comparison is exact. No
    structure becomes empty.
    """
    logits = logits.detach()
    order = logits.sort().values
    always = keep_one(torch.zeros_like(logits, dtype=torch.bool), logits, budget.space)
    # A threshold at index i removes every logit below order[i]. Tensors only, so that no step needs a device sync.
    low, high = (torch.full((1,), end, device=order.device) for end in (0, len(order) - 1))
    for _ in range(len(order).bit_length()):
        middle = (low + high) // 2
        fits = budget.portion((logits >= order[middle]) | always) <= share
        low, high = torch.where(fits, low, torch.minimum(middle + 1, high)), torch.where(fits, middle, high)
    return -order[low].squeeze(0)


def exact_mask(logits: Tensor, share: float, budget: Budget) -> Tensor:
    """The noise-free mask that keeps just under `share` of the decoder parameters, bool [size]."""
    return keep_one(logits.detach() + exact_offset(logits, share, budget) >= 0, logits.detach(), budget.space)


def fit_mask(
    logits: Tensor, target: float, budget: Budget, multiples: dict[str, int] | None, empty: Tensor | None = None
) -> Tensor:
    """The noise-free decision, trimmed or grown by logit until the budget and the width rules hold.

    logits float [size]; target: share of decoder parameters. multiples: structure name -> number that its kept count
    must be a multiple of (default 1) unless the structure is kept whole; None: those of `width_rules`. Counts are
    rounded first; then blocks of `multiple` decisions are removed (lowest mean logit first) or added (highest first),
    skipping blocks that are too large, until no single block brings the share closer to the target. empty: bool
    [structures], of which nothing is kept; None for none.
    Returns bool [size] with at least one block in every other structure. Raises `NotReached` for logits that are not
    finite.
    """
    logits, multiples = logits.detach().cpu(), width_rules(budget, target, multiples)
    if not is_finite(logits):
        raise NotReached("the logits of the decisions hold NaN or infinity: start again with a lower decisions.lr")
    if empty is None:
        empty = torch.zeros(len(budget.space.structures), dtype=torch.bool)
    mask = exact_mask(logits.masked_fill(empty[budget.space.structure_of], -torch.inf), target, budget)
    counts = []
    for structure, is_empty in zip(budget.space.structures, empty.tolist(), strict=True):
        if is_empty or not structure.size:
            counts.append(0)
            continue
        step = structure.step(multiples)
        fewest = math.ceil(structure.least / step)
        counts.append(min(max(round(int(mask[structure.span].sum()) / step), fewest) * step, structure.size))
    orders = [structure.ranking(logits[structure.span]) for structure in budget.space.structures]
    ranked = [(logits[s.span][order], order) for s, order in zip(budget.space.structures, orders, strict=True)]
    best = _top(ranked, counts, budget.space)
    while True:
        gap = budget.share(best) - target
        for index, count in _blocks(ranked, counts, budget.space, multiples, shrink=gap > 0):
            candidate = _top(ranked, counts[:index] + [count] + counts[index + 1 :], budget.space)
            if abs(budget.share(candidate) - target) < abs(gap):
                counts[index], best = count, candidate
                break
        else:
            return best


def _top(ranked: list[tuple[Tensor, Tensor]], counts: list[int], space: MaskSpace) -> Tensor:
    mask = torch.zeros(space.size, dtype=torch.bool)
    for structure, (_, order), count in zip(space.structures, ranked, counts, strict=True):
        mask[structure.start + order[:count]] = True
    return mask


def _blocks(
    ranked: list[tuple[Tensor, Tensor]], counts: list[int], space: MaskSpace, multiples: dict[str, int], *, shrink: bool
) -> list[tuple[int, int]]:
    """Blocks to remove, lowest logits first, or to add, highest first: (structure index, its new count)."""
    blocks = []
    for index, (structure, (values, _), count) in enumerate(zip(space.structures, ranked, counts, strict=True)):
        step = structure.step(multiples)
        # The size of a structure need not be a multiple; its last block is then smaller.
        new = (count - 1) // step * step if shrink else min(count + step, structure.size)
        if new < structure.least or new == count or not count:
            continue
        block = values[min(new, count) : max(new, count)].mean()
        blocks.append((float(block if shrink else -block), index, new))
    return [(index, new) for _, index, new in sorted(blocks)]
