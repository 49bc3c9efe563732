"""Experts under masks: their router takes the place of a masked linear, since it decides what each expert adds."""

from __future__ import annotations

import copy
from typing import Any, cast

import torch
from torch import Tensor, nn

from atp.families import ExpertFamily
from atp.lora.observer import observed
from atp.models.cut import place_before


class MaskedRouter(nn.Module):
    """Placed before the class of a router: an expert may be out of its choice, or worth less, or observed.

    Masks are state of the current pass, [experts]: bool (hard) or float32 (soft, differentiable), None keeps all. The
    router chooses among experts whose mask is not 0, as it would if it had no other, in the family's own order of
    softmax, choice and normalization. A soft mask multiplies the weight of each chosen expert, and so what it adds.
    """

    rows = 1  # samples of the batch, whose tokens the block hands over in one row

    def start(self) -> None:
        """Sets the state of a pass without masks."""
        self.out_mask: Tensor | None = None
        self.observed: Tensor | None = None
        self._places: tuple[Tensor, Tensor | None] | None = None

    def set_masks(self, out_mask: Tensor | None, in_mask: Tensor | None, *, mask_lora: bool = False) -> None:
        """Sets the mask of the next passes, [experts]; the router carries no LoRA, and its inputs are never masked."""
        self.out_mask, self._places = out_mask, None

    def observe(self, axis: int, sums: Tensor | None) -> None:
        """Until the next call, backward passes add the gradients of a mask of ones to sums [samples, experts].

        The gradient is the sum over tokens of weight * <output of the expert, dL/d(output of the block)>.
        """
        self.observed = sums

    def forward(self, hidden_states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """hidden_states [tokens, hidden]. Returns logits [tokens, experts], weights and experts [tokens, taken]."""
        logits, weights, chosen = self._choose(hidden_states)
        soft = None if self.out_mask is None or self.out_mask.dtype == torch.bool else self.out_mask
        if soft is not None or self.observed is not None:
            # Side by side for all experts, so that the gradient of a mask is a plain sum over tokens.
            every = torch.zeros_like(logits, dtype=weights.dtype).scatter(1, chosen, weights)
            every = every if soft is None else every * soft.to(weights.dtype)
            seen = observed(every.view(self.rows, -1, logits.shape[1]), self.observed)
            weights = seen.view_as(every).gather(1, chosen)
        return logits, weights, chosen

    def _choose(self, hidden_states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        stock: Any = super()
        places = self._kept()
        if places is None:
            found: tuple[Tensor, Tensor, Tensor] = stock.forward(hidden_states)
            return found
        smaller = copy.copy(self)
        smaller.__class__ = type(self).__bases__[1]
        vars(smaller)["_parameters"] = {name: weight[places] for name, weight in self.named_parameters(recurse=False)}
        logits, weights, chosen = smaller.forward(hidden_states)
        every = logits.new_full((len(logits), cast(Any, self).num_experts), -torch.inf)
        return every.index_copy(1, places, logits), weights, places[chosen]

    def _kept(self) -> Tensor | None:
        """Which experts the mask leaves, int64; None for all. Found once for each mask, since the host must know."""
        mask = self.out_mask
        if mask is None:
            return None
        if self._places is None or self._places[0] is not mask:
            kept = mask.detach().nonzero().flatten()
            self._places = mask, None if len(kept) == len(mask) else kept
        return self._places[1]


class MaskedExperts(nn.Module):
    """Placed before the class of a layer's experts with their router, which is told how many samples there are."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        """As the stock class does; hidden_states [batch, tokens, hidden]."""
        for router in self.children():
            if isinstance(router, MaskedRouter):
                router.rows = len(hidden_states)
        stock: Any = super()
        result: Tensor = stock.forward(hidden_states)
        return result


def mask_experts(layer: nn.Module, family: ExpertFamily) -> None:
    """Lets a decoder layer's router take masks, in place: same objects, parameters and hooks."""
    router = layer.get_submodule(family.router)
    if not isinstance(router, MaskedRouter):
        place_before(router, MaskedRouter).start()
        place_before(layer.get_submodule("mlp"), MaskedExperts)


def unmask_experts(layer: nn.Module, family: ExpertFamily) -> None:
    """Gives router and experts their own classes back."""
    for module in (layer.get_submodule(family.router), layer.get_submodule("mlp")):
        if isinstance(module, (MaskedRouter, MaskedExperts)):
            module.__class__ = type(module).__bases__[1]
