"""DISP-LLM (Gao et al. 2024, arXiv 2410.11988): decisions in the space `disp`, learned while all weights are frozen.

Taken from the paper: its mask space, five independent selections per layer around a residual stream of full width; a
generator that learns from the gradients of its masks alone; and the cut of the pretrained weights as they are, without
a refit. The generator and the budget are those of the config, so that against ATP in the same space one thing differs:
the weights do not learn beside the decisions. `decisions.generator: gru`, `decisions.budget: penalty` and
`decisions.init: paper` come nearest to the paper, whose gradient estimator, ReinMax, is not here.
"""

from __future__ import annotations

from functools import partial

from torch import Tensor
from torch.utils.data import Dataset
from transformers import PreTrainedModel

from atp.baselines.calibration import calibration_batches
from atp.baselines.masked import masked_loss
from atp.config import ATPConfig
from atp.decide.budget import Budget
from atp.decide.maker import DecisionMaker
from atp.decide.saliency import fisher_saliency, saliency_logits
from atp.ground.devices import for_float64
from atp.spaces.space import MaskSpace


def disp_mask(model: PreTrainedModel, space: MaskSpace, calibration: Dataset, config: ATPConfig) -> Tensor:
    """The mask after as many decision steps as ATP's search takes, fitted to the budget; bool [space.size]."""
    decisions, steps = config.decisions, range(0, config.training.search, config.decisions.every)
    device, prior = next(model.parameters()).device, None
    with masked_loss(model, space, config) as loss_of:
        if decisions.init == "saliency":
            saliency = fisher_saliency(space, calibration_batches(calibration, config, device), loss_of)
            prior = saliency_logits(saliency, Budget(space), decisions)
        maker = DecisionMaker(space, decisions, search_steps=config.training.search, prior=prior, seed=config.seed,
                              max_bad_steps=config.training.max_bad_steps, device=for_float64(device))  # fmt: skip
        batches = calibration_batches(calibration, config, device, count=len(steps), size=decisions.batch_size)
        for step, batch in zip(steps, batches, strict=True):
            maker.update(step, partial(loss_of, batch))
    return maker.freeze()
