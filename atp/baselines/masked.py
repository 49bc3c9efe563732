"""The calibration loss of a frozen model under a soft mask, for baselines that learn or differentiate the mask."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from torch import Tensor, nn

from atp.baselines.calibration import Batch, calibration_loss
from atp.config import ATPConfig
from atp.lora.controller import MaskController
from atp.lora.layer import add_lora
from atp.masks.space import MaskSpace
from atp.training.precision import autocast_dtype


@contextmanager
def masked_loss(model: nn.Module, space: MaskSpace, config: ATPConfig) -> Iterator[Callable[[Batch, Tensor], Tensor]]:
    """Yields loss_of(batch, mask), differentiable in the mask [space.size] alone; the model comes back as it was.

    Uses ATP's own masked layers, with an adapter that adds nothing (its B is zero) and learns nothing.
    """
    training, mlps = model.training, [layer.mlp for layer in model.model.layers]
    wrapped = add_lora(model, space, r=1, alpha=1.0, dropout=0.0, seed=config.seed).eval()
    wrapped.requires_grad_(False)
    controller = MaskController(wrapped, space)
    device, dtype = next(wrapped.parameters()).device, autocast_dtype(config.training.precision)

    def loss_of(batch: Batch, mask: Tensor) -> Tensor:
        controller.set(mask.to(device), "soft")
        return calibration_loss(wrapped, batch, dtype)

    try:
        yield loss_of
    finally:
        plain = wrapped.unload()
        for layer, mlp in zip(plain.model.layers, mlps, strict=True):
            # add_lora puts a fused MLP in the place of each, and unload gives back linears, not modules around them.
            mlp.gate_proj, mlp.up_proj, mlp.down_proj = layer.mlp.gate_proj, layer.mlp.up_proj, layer.mlp.down_proj
            layer.mlp = mlp
        plain.train(training)
