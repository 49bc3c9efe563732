"""Hands the masks of the whole model to its LoRA layers, and the kept slices that hard masks are computed with."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

import torch
from torch import Tensor, nn

from atp.lora.layer import MaskedLoraLinear
from atp.spaces.space import MaskSpace
from atp_kernels import KeptFirst, KeptSlice

# Nothing but element-wise work lies between gate, up and down, so their channels may lie in any order, ...
_CHANNELS = {"mlp.gate_proj": 0, "mlp.up_proj": 0, "mlp.down_proj": 1}
# ... and attention treats all heads alike, so whole heads may, together with the key and value heads that they read.
_HEADS = {"self_attn.q_proj": 0, "self_attn.k_proj": 0, "self_attn.v_proj": 0, "self_attn.o_proj": 1}


class MaskController:
    """Hands the masks of a flat vector to the LoRA layers of a model, in one of the forms of the method."""

    def __init__(self, model: nn.Module, space: MaskSpace) -> None:
        self.space = space
        # Which side of a linear lies kept first.
        self._sorted = _CHANNELS | (_HEADS if space.name == "kv_group" else {})
        self._layers: dict[tuple[int, str], MaskedLoraLinear] = {}
        for name, module in model.named_modules():
            if isinstance(module, MaskedLoraLinear):
                layer, local = name.split(".layers.")[-1].split(".", 1)
                self._layers[int(layer), local] = module
        missing = space.num_layers * len(space.linears) - len(self._layers)
        if missing:
            raise RuntimeError(f"{missing} linears of the mask space carry no MaskedLoraLinear: wrap with add_lora")
        # The last hard mask, on the host, and what it gives each linear: (out_mask, in_mask, slice).
        self._hard: Tensor | None = None
        self._sides: dict[tuple[int, str], tuple[Tensor | None, Tensor | None, KeptSlice]] = {}

    def clear(self) -> None:
        """Back to the plain LoRA model. Slices are held for the next hard mask."""
        for layer in self._layers.values():
            layer.set_masks(None, None)

    def forget(self) -> None:
        """Drops the slices, which are copies: the base weights have changed."""
        self._hard, self._sides = None, {}
        self.clear()

    def set(self, mask: Tensor, form: Literal["soft", "hard", "base", "sum"]) -> None:
        """mask [space.size], on the host if the device should not be waited for; see `masks` for the forms."""
        if form == "hard":
            self._slice(mask.cpu())
            for key, (out_mask, in_mask, kept) in self._sides.items():
                self._layers[key].set_masks(out_mask, in_mask, kept=kept)
            return
        for layer, module, out_mask, in_mask in self._module_masks(mask):
            # Soft producers are masked at their output, so the input side of o and down is masked already.
            in_mask = None if form == "soft" else in_mask
            self._layers[layer, module].set_masks(out_mask, in_mask, mask_lora=form != "base")

    @contextmanager
    def masks(self, mask: Tensor, form: Literal["soft", "hard", "base", "sum"]) -> Iterator[None]:
        """Applies a mask for the duration of a with block.

        soft: decision step, float mask on the sum, output side only. hard: LoRA step, bool mask on the base path only,
        both sides, through slices. base: the same without slices, for a measurement.
        sum: evaluation before the cut, bool mask on the sum, which is what the cut model computes.
        """
        self.set(mask, form)
        try:
            yield
        finally:
            self.clear()

    def _module_masks(self, mask: Tensor) -> Iterator[tuple[int, str, Tensor | None, Tensor | None]]:
        device = next(iter(self._layers.values())).get_base_layer().weight.device
        return self.space.module_masks(mask.to(device))

    def _slice(self, mask: Tensor) -> None:
        """Makes the slices of the base weights under a hard mask, where it differs from that of the last call."""
        stale = {
            (structure.layer, cut.module)
            for structure in self.space.structures
            if self._hard is None or not torch.equal(mask[structure.span], self._hard[structure.span])
            for cut in structure.cuts
        }
        orders: dict[tuple[int, str, int], KeptFirst] = {}
        for layer, module, out_mask, in_mask in self._module_masks(mask) if stale else ():
            if (layer, module) not in stale:
                continue
            masks = [out_mask, in_mask]
            if module in self._sorted:
                side = self._sorted[module]
                # Sides of one block and size are cut alike: gate, up and down, q and o, k and v.
                key = layer, module.split(".")[0], masks[side].numel()
                if key not in orders:
                    orders[key] = KeptFirst(masks[side])
                masks[side] = orders[key]
            base = self._layers[layer, module].get_base_layer()
            kept = KeptSlice(base.weight, base.bias, out_mask=masks[0], in_mask=masks[1])
            self._sides[layer, module] = out_mask, in_mask, kept
        self._hard = mask.clone()
