"""Refits the linears that read removed inputs, so that the kept inputs reproduce the removed inputs' contribution.

Without the removed inputs r, y = W x lacks W_r x_r. Least squares over calibration text adds
W_r X_r^T X_k (X_k^T X_k + lambda I)^-1 to W_k. Layers are refitted in order, each on the activations of the layers
before it, cut and refitted: refitting all of them on the activations of the whole model measured worse than no refit
(docs/method.md section 8).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from atp.errors import NotReached
from atp.finite import is_finite
from atp.lora.controller import MaskController
from atp.lora.layer import ADAPTER, MaskedLoraLinear
from atp.models.layers import BLOCKS, add_block, first_layer_inputs, reached, run_block
from atp.spaces.space import MaskSpace

_DAMPING = 0.01
_ROWS = 4096  # tokens in one product


@torch.no_grad()
def refit(
    decoder: PreTrainedModel,
    controller: MaskController,
    space: MaskSpace,
    mask: Tensor,
    batches: Iterable[dict[str, Any]],
    *,
    damping: float = _DAMPING,
) -> dict[str, Tensor]:
    """Changes the base weights of the linears that end a block where `mask`, bool [space.size], removes their inputs.

    decoder: a decoder in evaluation mode whose linears are masked LoRA layers; LoRA counts as part of the weight.
    batches: as `atp.data.collate` makes them; the hidden states of all of them and the inputs of one linear are in
    memory at once. damping: lambda as a share of the mean square of the kept inputs. Columns of removed inputs stay as
    they are. Clears the masks; kept slices are stale afterwards. Returns the changed weights, not copied, by their
    names in the decoder. Raises `NotReached` when inputs or fitted weights are not finite.
    """
    states, arguments = map(list, zip(*(first_layer_inputs(decoder, batch) for batch in batches), strict=True))
    changed = {}
    layers: Any = decoder.layers
    for index, layer in enumerate(layers):
        for norm, block in BLOCKS:
            calls = [
                partial(run_block, layer, norm, block, x, given) for x, given in zip(states, arguments, strict=True)
            ]
            structure = space.read_by(index, block)
            if structure is None or structure.reader is None or mask[structure.span].all():
                controller.set(mask, "sum")
                states = [call() for call in calls]
                continue
            linear: Any = layer.get_submodule(structure.reader)
            opened = mask.clone()
            opened[structure.span] = True  # the fit needs the removed inputs too
            controller.set(opened, "sum")
            inputs = [_input(linear, call) for call in calls]
            name = f"layers.{index}.{structure.reader}"
            if not all(map(is_finite, inputs)):
                raise NotReached(
                    f"{name} reads NaN or infinity on the calibration windows, so it cannot be refitted: use "
                    "model.dtype=float32 and training.precision=float32, or decisions.refit_windows=0"
                )
            _fit(linear, inputs, structure.kept_inputs(mask).to(linear.weight.device), damping)
            weight = linear.get_base_layer().weight
            if not is_finite(weight):
                raise NotReached(
                    f"the refit of {name} gives weights that {weight.dtype} cannot hold: use model.dtype=float32, or "
                    "decisions.refit_windows=0"
                )
            changed[f"{name}.base_layer.weight"] = weight
            controller.set(mask, "sum")
            # The reader ends its block.
            states = [add_block(layer, x, linear(read)) for x, read in zip(states, inputs, strict=True)]
    controller.clear()
    return changed


def _input(linear: nn.Module, call: Callable[[], Tensor]) -> Tensor:
    """The input of a linear in a forward pass, which stops there."""
    with reached(linear) as found:
        call()
    return found[0]


def _fit(linear: MaskedLoraLinear, inputs: list[Tensor], kept: Tensor, damping: float) -> None:
    """Normal equations in float32 or wider, solved in float64."""
    base: Any = linear.get_base_layer()
    weight: Tensor = base.weight
    delta: Tensor = linear.get_delta_weight(ADAPTER)
    wide = torch.promote_types(weight.dtype, torch.float32)
    removed = (weight.to(wide) + delta.to(wide))[:, ~kept].T
    count = int(kept.sum())
    moments = removed.new_zeros(count, count)
    cross = removed.new_zeros(count, len(weight))
    with torch.autocast(weight.device.type, enabled=False):
        for chunk in torch.cat([x.flatten(0, -2) for x in inputs]).split(_ROWS):
            x = chunk.to(wide)
            x_kept = x[:, kept]
            moments.addmm_(x_kept.T, x_kept)
            cross.addmm_(x_kept.T, x[:, ~kept] @ removed)
    moments = moments.double()
    smallest = torch.finfo(wide).tiny  # where all inputs are zero the system would be singular
    moments.diagonal().add_((damping * moments.diagonal().mean()).clamp_min(smallest))
    fitted = weight[:, kept].double() + torch.linalg.solve(moments, cross.double()).T
    weight[:, kept] = fitted.to(weight.dtype)  # rounded once, after the sum
