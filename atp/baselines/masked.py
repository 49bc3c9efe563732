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

_FUSED = ("mlp", "input_layernorm", "post_attention_layernorm")


@contextmanager
def masked_loss(model: nn.Module, space: MaskSpace, config: ATPConfig) -> Iterator[Callable[[Batch, Tensor], Tensor]]:
    """Yields loss_of(batch, mask), differentiable in the mask [space.size] alone; the model comes back as it was.

    Uses ATP's own masked layers, with an adapter that adds nothing (its B is zero) and learns nothing.
    """
    training, stock = model.training, [{name: getattr(layer, name) for name in _FUSED} for layer in model.model.layers]
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
        for layer, modules in zip(plain.model.layers, stock, strict=True):
            # add_lora puts fused modules in the place of these, and unload gives back linears, not modules around them.
            mlp = modules["mlp"]
            mlp.gate_proj, mlp.up_proj, mlp.down_proj = layer.mlp.gate_proj, layer.mlp.up_proj, layer.mlp.down_proj
            for name, module in modules.items():
                setattr(layer, name, module)
        plain.train(training)
