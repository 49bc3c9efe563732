"""A frozen model under masks, for baselines that learn masks, take their gradients, or refit."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import PreTrainedModel

from atp.baselines.calibration import Batch, calibration_loss
from atp.config import ATPConfig
from atp.evaluation.inference import inference
from atp.inputs.precision import autocast_dtype
from atp.lora.controller import MaskController
from atp.lora.layer import add_lora, stock_modules, unload
from atp.removal.refit import refit
from atp.spaces.space import MaskSpace
from atp.training.data import refit_batch, refit_orders


@contextmanager
def masked(
    model: PreTrainedModel, space: MaskSpace, config: ATPConfig
) -> Iterator[tuple[nn.Module, MaskController, torch.dtype | None]]:
    """Yields the model inside ATP's own masked layers, their controller, and the dtype to run it in.

    The adapter adds nothing (its B is zero) and does not learn; the model is restored afterwards.
    """
    training, stock = model.training, stock_modules(model)
    wrapped = add_lora(model, space, r=1, alpha=1.0, dropout=0.0, seed=config.seed).eval()
    wrapped.requires_grad_(False)
    try:
        yield wrapped, MaskController(wrapped, space), autocast_dtype(config.training.precision)
    finally:
        unload(wrapped, stock).train(training)


@contextmanager
def masked_loss(
    model: PreTrainedModel, space: MaskSpace, config: ATPConfig
) -> Iterator[Callable[[Batch, Tensor], Tensor]]:
    """Yields loss_of(batch, mask), differentiable only in the mask [space.size]; the model is restored afterwards."""
    with masked(model, space, config) as (wrapped, controller, dtype):
        device = next(wrapped.parameters()).device

        def loss_of(batch: Batch, mask: Tensor) -> Tensor:
            controller.set(mask.to(device), "soft")
            return calibration_loss(wrapped, batch, dtype)

        yield loss_of


def refit_readers(
    model: PreTrainedModel, space: MaskSpace, mask: Tensor, calibration: Dataset, config: ATPConfig
) -> None:
    """ATP's `refit`, in place, for a model without LoRA, on `decisions.refit_windows` calibration windows."""
    count = min(config.decisions.refit_windows, len(calibration))  # type: ignore[arg-type]  # ours all have a length
    if count:
        device = next(model.parameters()).device
        orders = refit_orders(calibration, count, config.seed + 1)
        batches = (refit_batch(calibration, rows, device) for rows in orders)
        with masked(model, space, config) as (wrapped, controller, dtype), inference(wrapped, dtype):
            decoder = wrapped.get_base_model().get_decoder()  # type: ignore[operator]  # nn.Module knows no methods
            refit(decoder, controller, space, mask, batches)
