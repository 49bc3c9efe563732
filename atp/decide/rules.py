"""Which widths a cut model may have, where the config leaves it open."""

from __future__ import annotations

import torch

from atp.decide.budget import Budget

_WIDTHS = (64, 32, 16, 8, 4, 2)  # 64: what 4-bit kernels and tensor cores want
_COARSEST = 0.002  # of the decoder; the fit then ends within half of it


def width_rules(budget: Budget, target: float, multiples: dict[str, int] | None) -> dict[str, int]:
    """For a structure name the number that its kept counts must be multiples of; others may have any.

    multiples: the config's, taken as they are. None leaves it to the model: MLP widths are multiples of 64 where that
    divides the model's own and the target share stays in reach, else of the largest smaller power of two for which both
    hold. In reach: one block is at most 0.2 % of the decoder, and one in every layer leaves room for the target.
    """
    if multiples is not None:
        return multiples
    (mlp,) = (structure for structure in budget.space.layer(0) if structure.name == "mlp")
    channel = float(budget.cost()[mlp.start]) / budget.total
    for step in _WIDTHS:
        if mlp.size % step == 0 and step * channel <= _COARSEST and _least(budget, step) <= target:
            return {"mlp": step}
    return {}


def _least(budget: Budget, step: int) -> float:
    """The least share of the decoder that MLPs in blocks of `step` allow."""
    mask = torch.zeros(budget.space.size, dtype=torch.bool)
    for structure in budget.space.structures:
        mask[structure.start : structure.start + (step if structure.name == "mlp" else 1)] = True
    return budget.share(mask)
