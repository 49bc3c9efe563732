"""Fits the linears that read a cut to the inputs that stay, so that these say what the removed ones said.

o_proj and down_proj read what a decision removes. Without the inputs r, y = W x lacks W_r x_r; the least-squares answer
over calibration text adds W_r X_r^T X_k (X_k^T X_k + lambda I)^-1 to W_k. Layer after layer, each on what the layers
before it give once they are cut and fitted: fitting all of them to the whole model's activations measured worse than
nothing (1-method.md section 9).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from atp.lora.controller import MaskController
from atp.lora.layer import ADAPTER, MaskedLoraLinear
from atp.masks.space import MaskSpace, Structure
from atp.models.layers import BLOCKS, first_layer_inputs, run_block

_DAMPING = 0.01


@torch.no_grad()
def refit(
    decoder: nn.Module,
    controller: MaskController,
    space: MaskSpace,
    mask: Tensor,
    batches: Iterable[dict[str, Any]],
    *,
    damping: float = _DAMPING,
) -> dict[str, Tensor]:
    """Changes the base weights of o_proj and down_proj where `mask`, bool [space.size], removes inputs of theirs.

    decoder: a Llama or Mistral decoder in evaluation mode whose linears are masked LoRA layers; LoRA counts as part of
    the weight. batches: what `atp.data.collate` makes; the hidden states of all of them are held at once. damping:
    lambda as a share of the mean square of the kept inputs. Columns of removed inputs stay as they were. Masks are
    cleared afterwards, kept slices are stale. Returns the changed weights by their names in the decoder, not copied.
    """
    states, arguments = map(list, zip(*(first_layer_inputs(decoder, batch) for batch in batches), strict=True))
    changed = {}
    for index, layer in enumerate(decoder.layers):
        for norm, block in BLOCKS:
            run = partial(_outputs, layer, norm, block, states, arguments)
            for structure, module, kept in _readers(space, index, block, mask):
                opened = mask.clone()
                opened[structure.span] = True  # its removed inputs are computed once more, to see what they say
                controller.set(opened, "sum")
                linear = layer.get_submodule(module)
                _fit(linear, kept.to(linear.weight.device), run, damping)
                changed[f"layers.{index}.{module}.base_layer.weight"] = linear.get_base_layer().weight
            controller.set(mask, "sum")
            states = list(run())
    controller.clear()
    return changed


def _outputs(layer: nn.Module, norm: str, block: str, states: list[Tensor], arguments: list[Any]) -> Iterator[Tensor]:
    return (run_block(layer, norm, block, x, given) for x, given in zip(states, arguments, strict=True))


def _readers(space: MaskSpace, layer: int, block: str, mask: Tensor) -> Iterator[tuple[Structure, str, Tensor]]:
    """The structures that remove inputs of a linear of this block, that linear, and the inputs that stay, bool [in]."""
    for structure in space.layer(layer):
        for cut in structure.cuts:
            kept = mask[structure.span][cut.owner]
            if cut.axis == 1 and cut.module.startswith(block) and not kept.all():
                yield structure, cut.module, kept


def _fit(linear: MaskedLoraLinear, kept: Tensor, run: Callable[[], Iterator[Tensor]], damping: float) -> None:
    """Sums normal equations over the inputs that the linear sees during `run`, and solves them in float64."""
    weight = linear.get_base_layer().weight
    wide = torch.promote_types(weight.dtype, torch.float32)
    removed = (weight.to(wide) + linear.get_delta_weight(ADAPTER).to(wide))[:, ~kept].T
    count = int(kept.sum())
    moments = removed.new_zeros(count, count)
    cross = removed.new_zeros(count, len(weight))

    def add(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        x = args[0].flatten(0, -2).to(wide)
        x_kept = x[:, kept]
        with torch.autocast(x.device.type, enabled=False):
            moments.addmm_(x_kept.T, x_kept)
            cross.addmm_(x_kept.T, x[:, ~kept] @ removed)

    hook = linear.register_forward_pre_hook(add)
    try:
        for _ in run():
            pass
    finally:
        hook.remove()
    moments = moments.double()
    smallest = torch.finfo(wide).tiny  # inputs that are all zero need no fit, and allow none
    moments.diagonal().add_((damping * moments.diagonal().mean()).clamp_min(smallest))
    weight[:, kept] += torch.linalg.solve(moments, cross.double()).T.to(weight.dtype)
