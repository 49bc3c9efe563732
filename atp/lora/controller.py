"""Hands the masks of the whole model to its LoRA layers, with the kept slices that hard masks are computed on."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from atp.families import EXPERTS, Channels
from atp.ground.devices import upload
from atp.lora.experts import MaskedChannels, MaskedRouter
from atp.lora.layer import MaskedPeftLinear
from atp.lora.observer import MaskObserver
from atp.spaces.space import MaskSpace
from atp_kernels import KeptFirst, KeptSlice

_Linear = tuple[int, str]  # its layer and its name in that layer


class _Side(NamedTuple):
    """A hard mask of one side of a linear, on the device, and its copy on the host or its order, for the slice."""

    mask: Tensor | None = None
    origin: Tensor | KeptFirst | None = None


class MaskController:
    """Hands a flat mask to the LoRA layers and routers of a model, in a form of docs/method.md section 3."""

    def __init__(self, model: nn.Module, space: MaskSpace) -> None:
        self.space = space
        self._linears: dict[_Linear, MaskedPeftLinear] = {}
        self._routers: dict[_Linear, MaskedRouter | MaskedChannels] = {}  # or experts, where channels are decided
        carriers = MaskedChannels if isinstance(space.linears[0].get(EXPERTS), Channels) else MaskedRouter
        for name, module in model.named_modules():
            if isinstance(module, MaskedPeftLinear):
                layer, local = name.split(".layers.")[-1].split(".", 1)
                self._linears[int(layer), local] = module
            elif isinstance(module, carriers):
                layer, local = name.split(".layers.")[-1].split(".", 1)
                self._routers[int(layer), local.replace(".base_layer", "")] = module
        self._layers: dict[_Linear, Any] = {**self._linears, **self._routers}
        expected = sum(linear.lora for layer in range(space.num_layers) for linear in space.present(layer).values())
        missing = expected - len(self._linears)
        if missing:
            raise RuntimeError(f"{missing} linears of the mask space carry no MaskedPeftLinear: wrap with add_lora")
        self._space = space.to(self._device)
        self.observer = MaskObserver(self._space, self._layers)
        # Whether a decision lies in the memory of the one before, for CUDA graphs: a CPU would copy for nothing.
        self.keeps_memory = self._device.type != "cpu"
        # The last hard mask, on the host, and what it makes of the two sides of each linear and of its weight.
        self._hard: Tensor | None = None
        self._sides: dict[_Linear, list[_Side]] = {}
        self._slices: dict[_Linear, KeptSlice] = {}

    def clear(self) -> None:
        """Removes all masks, so that the model is plain LoRA again. Slices are kept for the next hard mask."""
        for layer in self._layers.values():
            layer.set_masks(None, None)

    def forget(self) -> None:
        """Drops the slices, which are copies of base weights; call it after these changed."""
        self._hard, self._sides, self._slices = None, {}, {}
        self.clear()

    def set(self, mask: Tensor, form: Literal["soft", "hard", "base", "sum"]) -> None:
        """Sets a mask [space.size]; a hard one lies on the host, a soft one on the device, or it is copied there.

        Forms: see `masks`.
        """
        if form == "hard":
            self._slice(mask.cpu())
            for name, kept in self._slices.items():
                outs, ins = self._sides[name]
                self._linears[name].set_masks(outs.mask, ins.mask, kept=kept)
            for name, router in self._routers.items():
                router.set_masks(self._sides[name][0].mask, None)
            return
        # A mask that is on a GPU comes from a search, which empties no block; asking would halt the host.
        closed = self.space.closed(mask.detach() > 0) if mask.device.type == "cpu" else set()
        for layer, module, out_mask, in_mask in self._space.module_masks(mask.to(self._device), soft=form == "soft"):
            if (carrier := self._layers.get((layer, module))) is not None:  # whole experts go by their router
                if (layer, module) in closed:
                    out_mask = self._nothing(layer, module, mask.dtype).to(self._device)
                carrier.set_masks(out_mask, in_mask, mask_lora=form != "base")

    @contextmanager
    def masks(self, mask: Tensor, form: Literal["soft", "hard", "base", "sum"]) -> Iterator[None]:
        """Applies a mask for the duration of a with block.

        soft: decision step, float mask on the sum of base and LoRA path, on the sides that the space names.
        hard: LoRA step, bool mask on the base path alone, both sides, through slices. base: the same without slices,
        for a measurement. sum: evaluation before the cut, bool mask on the sum, which is what the cut model computes.
        """
        self.set(mask, form)
        try:
            yield
        finally:
            self.clear()

    def _nothing(self, layer: int, module: str, dtype: torch.dtype = torch.bool) -> Tensor:
        """A mask of the outputs of a linear, on the host, that keeps none of them, its bias included."""
        return torch.zeros(self.space.linears[layer][module].out_features, dtype=dtype)

    @property
    def _device(self) -> torch.device:
        base: Any = next(iter(self._linears.values())).get_base_layer()
        return base.weight.device

    def _slice(self, mask: Tensor) -> None:
        """Makes the slices of the base weights again where a hard mask differs from that of the last call."""
        changed = [
            (structure, placed)
            for structure, placed in zip(self.space.structures, self._space.structures, strict=True)
            if structure.size
            and (self._hard is None or not torch.equal(mask[structure.span], self._hard[structure.span]))
        ]
        if not changed:
            return
        moved, closed = upload(mask, self._device), self.space.closed(mask)
        for structure, placed in changed:
            # By the mask that several sides share. Counting on the device would halt the host, so the host counts.
            origins: dict[int, Tensor | KeptFirst] = {}
            for (cut, on_host), (_, side) in zip(structure.sides(mask), placed.sides(moved), strict=True):
                sides = self._sides.setdefault((structure.layer, cut.module), [_Side(), _Side()])
                if id(side) not in origins:
                    origins[id(side)] = on_host
                    if cut.reorderable:
                        before = sides[cut.axis].origin
                        order = before if self.keeps_memory and isinstance(before, KeptFirst) else None
                        origins[id(side)] = KeptFirst(on_host, device=self._device, reuse=order)
                sides[cut.axis] = _Side(side, origins[id(side)])
                if structure.block is not None and cut.module == structure.reader:
                    none = self._nothing(structure.layer, cut.module)
                    sides[0] = (
                        _Side(upload(none, self._device), none) if (structure.layer, cut.module) in closed else _Side()
                    )
        for name in dict.fromkeys((structure.layer, cut.module) for structure, _ in changed for cut in structure.cuts):
            if name not in self._linears:
                continue
            base: Any = self._linears[name].get_base_layer()
            outs, ins = (side.origin for side in self._sides[name])
            reuse = self._slices.get(name) if self.keeps_memory else None
            self._slices[name] = KeptSlice(base.weight, base.bias, out_mask=outs, in_mask=ins, reuse=reuse)
        self._hard = mask.clone()
