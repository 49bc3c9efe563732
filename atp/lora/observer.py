"""What the backward pass of a LoRA step says of each decision: the gradient of a mask of ones that nobody applies.

A soft mask multiplies values y of a linear, and its gradient is the sum of y * dL/dy. Both are at hand where y is made,
so the step runs as without masks: shared, fused, with any number of samples. It does not matter what is trained.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from atp.spaces.space import MaskSpace, Structure
from atp_kernels import mask_gradient

if TYPE_CHECKING:
    from atp.lora.experts import MaskedChannels, MaskedRouter
    from atp.lora.layer import MaskedPeftLinear

    _Observed = tuple[MaskedPeftLinear | MaskedRouter | MaskedChannels, int]  # with the axis


def observed(values: Tensor, sums: Tensor | None) -> Tensor:
    """Values [batch, ..., features]; their backward pass adds gradients of masks of ones to sums [samples, features].

    A smaller batch has the first rows. One of more samples, as of preferred and rejected answers, takes them in turns.
    """
    if sums is None or not torch.is_grad_enabled():
        return values
    if not values.requires_grad:  # as that of the first layer's input, which nothing before it needs
        values = values.detach().requires_grad_()
    turns = [mask_gradient(part, sums[: len(part)]) for part in values.split(len(sums))]
    return turns[0] if len(turns) == 1 else torch.cat(turns)


@dataclass
class _Place:
    """Structures whose decisions own the features of one side in the same way, and where those sides are observed."""

    owner: Tensor
    structures: list[Structure] = field(default_factory=list)
    layers: list[list[_Observed]] = field(default_factory=list)  # of each structure
    order: Tensor | None = None  # of the features, by decision; None where each feature is a decision
    decisions: Tensor = field(default_factory=lambda: torch.empty(0))  # of all structures, in the flat vector


class MaskObserver:
    """Collects gradients of the mask of every sample of a batch, on the sides that a soft mask would multiply."""

    def __init__(self, space: MaskSpace, layers: Mapping[tuple[int, str], Any]) -> None:
        """space: on the device of the model. layers: its linears, routers and experts, by layer and name."""
        self.size, self.device = space.size, space.structure_of.device
        found: dict[int, _Place] = {}
        for structure in space.structures:
            sides: dict[int, list[_Observed]] = {}
            for cut in structure.cuts:
                if cut.soft and structure.size:
                    found.setdefault(id(cut.owner), _Place(cut.owner))
                    sides.setdefault(id(cut.owner), []).append((layers[structure.layer, cut.module], cut.axis))
            for owner, observed in sides.items():
                found[owner].structures.append(structure)
                found[owner].layers.append(observed)
        self._places = list(found.values())
        self._sums: list[Tensor] | None = None
        for place in self._places:
            spans = [torch.arange(s.start, s.start + s.size) for s in place.structures]
            place.decisions = torch.cat(spans).to(self.device)
            if len(place.owner) != place.structures[0].size or not torch.equal(place.owner, place.owner.sort().values):
                place.order = place.owner.argsort(stable=True)

    @contextmanager
    def observing(self, samples: int) -> Iterator[list[Tensor]]:
        """Around forward and backward passes of batches of so many samples: yields what `gradients` makes them of.

        A smaller batch has the first samples. One of more, as of preferred and rejected answers, takes them in turns.
        """
        if self._sums is None or self._sums[0].shape[1] != samples:
            shapes = ((len(place.structures), samples, len(place.owner)) for place in self._places)
            self._sums = [torch.empty(shape, device=self.device) for shape in shapes]
        sums = self._sums  # where they were: a CUDA graph adds to them
        for part in sums:
            part.zero_()
        observed = [
            (layer, axis, part)
            for place, parts in zip(self._places, sums, strict=True)
            for sides, part in zip(place.layers, parts.unbind(), strict=True)
            for layer, axis in sides
        ]
        for layer, axis, part in observed:
            layer.observe(axis, part)
        try:
            yield sums
        finally:
            for layer, axis, _ in observed:
                layer.observe(axis, None)

    def gradients(self, sums: list[Tensor]) -> Tensor:
        """The gradient of the mask of each sample, float32 [samples, size of the space]."""
        found = torch.zeros(sums[0].shape[1], self.size, device=self.device)
        for place, values in zip(self._places, sums, strict=True):
            each = place.structures[0].size
            if place.order is not None:  # equally many features for each decision, those of one beside each other
                values = values.index_select(-1, place.order).unflatten(-1, (each, -1)).sum(-1)
            found[:, place.decisions] += values.transpose(0, 1).flatten(1)
        return found
