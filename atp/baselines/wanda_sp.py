"""Wanda-sp: a structured form of Wanda's |W| * ||X||, from the FLAP paper (An et al. 2023, arXiv 2312.11983).

The score of an input of o_proj or down_proj is the sum over outputs of |w|, times the input's 2-norm over all
calibration tokens; that of a group is the sum over its inputs. Every layer loses the same share.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import PreTrainedModel

from atp.baselines.calibration import Batch, calibration_batches
from atp.baselines.uniform import uniform_mask
from atp.baselines.weights import LinearName, group_sums, prunable_linears
from atp.config import ATPConfig
from atp.decide.budget import Budget
from atp.evaluation.inference import inference
from atp.inputs.precision import autocast_dtype
from atp.models.layers import hidden_arguments
from atp.spaces.space import MaskSpace


def wanda_mask(model: PreTrainedModel, space: MaskSpace, calibration: Dataset, config: ATPConfig) -> Tensor:
    """Keeps the groups with the highest score in every layer; bool [space.size]."""
    batches = calibration_batches(calibration, config, next(model.parameters()).device)
    scores = wanda_scores(model, space, batches, autocast=autocast_dtype(config.training.precision))
    return uniform_mask(scores, config.decisions.target_keep, Budget(space), config.decisions.multiples)


def wanda_scores(
    model: PreTrainedModel, space: MaskSpace, batches: Iterable[Batch], *, autocast: torch.dtype | None = None
) -> Tensor:
    """Sum over a group of |w| * ||x||, over the linears that it cuts on their inputs, float64 [space.size]."""
    linears = prunable_linears(model, space)
    consumers = {cut.module for structure in space.layer(0) for cut in structure.cuts if cut.axis == 1}
    squares = {
        name: torch.zeros(linear.in_features, dtype=torch.float64, device=linear.weight.device)
        for name, linear in linears.items()
        if name[1] in consumers
    }

    def add(name: LinearName, module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        squares[name] += inputs[0].double().square().flatten(0, -2).sum(0)

    hooks = [linears[name].register_forward_pre_hook(partial(add, name)) for name in squares]
    try:
        with inference(model, autocast):
            for batch in batches:
                model(**hidden_arguments(batch))
    finally:
        for hook in hooks:
            hook.remove()
    return group_sums(space, lambda name: linears[name].weight.detach().abs() * squares[name].sqrt(), axes=(1,))
