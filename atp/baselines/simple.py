"""Simple choices: at random, by magnitude, and by ATP's saliency at step 0 (static)."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.data import Dataset
from transformers import PreTrainedModel

from atp.baselines.calibration import calibration_batches
from atp.baselines.masked import masked_loss
from atp.baselines.uniform import uniform_mask
from atp.baselines.weights import group_sums, prunable_linears, weight_of
from atp.config import ATPConfig
from atp.decide.budget import Budget
from atp.decide.decisions import fit_decisions
from atp.decide.given import given_mask
from atp.decide.saliency import fisher_saliency, saliency_logits
from atp.spaces.space import MaskSpace


def random_mask(model: PreTrainedModel, space: MaskSpace, calibration: Dataset, config: ATPConfig) -> Tensor:
    """Random decisions from the seed, equally many in every layer; bool [space.size]."""
    scores = torch.rand(space.size, generator=torch.Generator().manual_seed(config.seed))
    return uniform_mask(scores, config.decisions.target_keep, Budget(space), config.decisions.multiples)


def magnitude_mask(model: PreTrainedModel, space: MaskSpace, calibration: Dataset, config: ATPConfig) -> Tensor:
    """Keeps the groups with the largest joint 2-norm of weights in every layer; bool [space.size]."""
    scores = magnitude_scores(model, space)
    return uniform_mask(scores, config.decisions.target_keep, Budget(space), config.decisions.multiples)


def magnitude_scores(model: PreTrainedModel, space: MaskSpace) -> Tensor:
    """Squared 2-norm of all weights that a decision removes, float64 [space.size]."""
    linears = prunable_linears(model, space)
    return group_sums(space, lambda name: weight_of(linears[name], space.linears[name[0]][name[1]]).double().square())


def static_mask(model: PreTrainedModel, space: MaskSpace, calibration: Dataset, config: ATPConfig) -> Tensor:
    """ATP's warm start, fitted to budget and width rules without learning; bool [space.size].

    With `decisions.path` the mask of that run.
    """
    if config.decisions.path is not None:
        return given_mask(config.decisions, space)
    device = next(model.parameters()).device
    with masked_loss(model, space, config) as loss_of:
        saliency = fisher_saliency(space, calibration_batches(calibration, config, device), loss_of)
    decisions = config.decisions
    logits = saliency_logits(saliency, Budget(space), decisions)
    return fit_decisions(logits, decisions, Budget(space))
