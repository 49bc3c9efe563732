"""Experts under masks: their router takes a mask of whole experts, and their weights take one of channels."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from atp.families import EXPERTS, ExpertFamily
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


STACKED = ("gate_up_proj", "down_proj")
"""The stacked weights of experts that carry LoRA, in the order in which they are parameters of their module."""


class ExpertAdapter(nn.Module):
    """Placed before PEFT's wrapper of stacked weights, which forms W + s B A of all experts in every pass.

    If this adapter is alone and not merged, the experts multiply by A and B instead (`MaskedChannels`).
    """

    @property
    def plain(self) -> bool:
        """Whether the experts add what this adapter does."""
        wrapper: Any = self
        return not (wrapper.disable_adapters or wrapper.merged) and len(wrapper.active_adapters) == 1

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """As the experts do; x [tokens, hidden]."""
        wrapper: Any = self if self.plain else super()
        result: Tensor = (wrapper.base_layer if self.plain else wrapper.forward)(x, *args, **kwargs)
        return result

    def factors(self) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...], float]:
        """A [rank, inputs] and B [outputs, rank] of each expert, and their scale."""
        wrapper: Any = self
        (adapter,) = wrapper.active_adapters
        a = expert_factors(wrapper.lora_A[adapter].weight, "lora_A", wrapper.num_experts)
        b = expert_factors(wrapper.lora_B[adapter].weight, "lora_B", wrapper.num_experts)
        return a.unbind(), b.unbind(), wrapper.scaling[adapter]


def expert_factors(factor: Tensor, name: str, experts: int) -> Tensor:
    """PEFT's stacked A [experts * rank, inputs] or B [outputs, rank * experts], expert by expert: a view.

    name: `lora_A` or `lora_B`. Returns [experts, rank, inputs] or [experts, outputs, rank].
    """
    return factor.unflatten(0, (experts, -1)) if name == "lora_A" else factor.unflatten(1, (-1, experts)).movedim(2, 0)


class MaskedChannels(nn.Module):
    """Placed before the class of a layer's stacked experts: what their down projections read is masked or observed.

    Masks are state of the current pass, [experts * inner], bool (hard) or float32 (soft, differentiable), None keeps
    all. With LoRA on the experts this adds what it gives. Passes with nothing of all this are the stock class's own.
    """

    rows = 1  # as for the router

    def start(self) -> None:
        """Sets the state of a pass without masks."""
        self.out_mask: Tensor | None = None
        self.observed: Tensor | None = None
        # By the weights that they are on, and not as submodules: this module is inside the adapters.
        vars(self)["adapters"] = {}

    def set_masks(self, out_mask: Tensor | None, in_mask: Tensor | None, *, mask_lora: bool = False) -> None:
        """Sets the mask of the next passes, of what base weights and an adapter make together."""
        self.out_mask = out_mask

    def observe(self, axis: int, sums: Tensor | None) -> None:
        """Until the next call, backward passes add the gradients of a mask of ones to sums [samples, channels]."""
        self.observed = sums

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """hidden_states [tokens, hidden]; experts of a token and their weights [tokens, taken]. As stock classes do."""
        stock: Any = super()
        adapters = {name: part for name, part in vars(self)["adapters"].items() if part.plain}
        if self.out_mask is None and self.observed is None and not adapters:
            found: Tensor = stock.forward(hidden_states, top_k_index, top_k_weights)
            return found
        module: Any = self
        tokens, taken = top_k_index.shape
        expert, order = top_k_index.flatten().sort(stable=True)  # the rows of one expert beside each other
        counts = torch.bincount(expert, minlength=module.num_experts).tolist()
        up, down = (_products(module, name, adapters.get(name)) for name in STACKED)
        rows = hidden_states[order // taken].split(counts)
        values = torch.cat([module._apply_gate(product(x)) for product, x in zip(up, rows, strict=True)])
        if self.out_mask is not None:
            values = (values * self.out_mask.view(module.num_experts, -1)[expert]).to(values.dtype)
        if self.observed is not None and torch.is_grad_enabled():
            sample = order // taken // max(tokens // self.rows, 1)
            values = _seen(values, self.observed, sample, counts)
        given = torch.cat([product(x) for product, x in zip(down, values.split(counts), strict=True)])
        weighted = given * top_k_weights.flatten()[order, None]
        every = torch.empty_like(weighted).index_copy(0, order, weighted)
        return every.view(tokens, taken, every.shape[1]).sum(1).to(hidden_states.dtype)


def _products(module: Any, name: str, adapter: ExpertAdapter | None) -> list[Callable[[Tensor], Tensor]]:
    """For each expert the product with one of its projections, its bias and what LoRA gives added."""
    weights = getattr(module, name)
    weights = (weights.transpose(1, 2) if module.is_transposed else weights).unbind()
    biases = getattr(module, f"{name}_bias").unbind() if module.has_bias else [None] * len(weights)
    base: list[Callable[[Tensor], Tensor]] = [
        partial(linear, weight=w, bias=b) for w, b in zip(weights, biases, strict=True)
    ]
    if adapter is None:
        return base
    *factors, scale = adapter.factors()
    return [partial(_with_lora, product, a, b, scale) for product, a, b in zip(base, *factors, strict=True)]


def _with_lora(base: Callable[[Tensor], Tensor], a: Tensor, b: Tensor, scale: float, x: Tensor) -> Tensor:
    y = base(x)
    return y + (linear(linear(x.to(a.dtype), a), b) * scale).to(y.dtype)


def _seen(values: Tensor, sums: Tensor, sample: Tensor, counts: list[int]) -> Tensor:
    """As `observed`, of rows that lie expert by expert, those of one in the order of samples."""
    if not values.requires_grad:
        values = values.detach().requires_grad_()
    found: Tensor = _ChannelGradient.apply(values, sums, sample, counts)
    return found


class _ChannelGradient(torch.autograd.Function):
    """Hands values on; backward adds values * gradient, summed by sample and expert, to sums [samples, channels]."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, sums: Tensor, sample: Tensor, counts: list[int]) -> Tensor:
        ctx.save_for_backward(values, sample)
        ctx.sums, ctx.counts = sums, counts
        return values.view_as(values)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        values, sample = ctx.saved_tensors
        each = (values.float() * gradient.float()).split(ctx.counts)
        by_expert = ctx.sums.view(len(ctx.sums), len(ctx.counts), -1).unbind(1)
        for found, own, at in zip(by_expert, each, sample.split(ctx.counts), strict=True):
            found.index_add_(0, at % len(found), own)  # more samples than rows take them in turns
        return gradient, None, None, None


class MaskedExperts(nn.Module):
    """Placed before the class of a layer's experts with their router, which are told how many samples there are."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        """As the stock class does; hidden_states [batch, tokens, hidden]."""
        for part in self.modules():
            if isinstance(part, (MaskedRouter, MaskedChannels)):
                part.rows = len(hidden_states)
        stock: Any = super()
        result: Tensor = stock.forward(hidden_states)
        return result


def mask_experts(layer: nn.Module, family: ExpertFamily) -> None:
    """Lets a decoder layer's router and experts take masks, in place: same objects, parameters and hooks."""
    router = layer.get_submodule(family.router)
    if not isinstance(router, MaskedRouter):
        place_before(router, MaskedRouter).start()
        outer: Any = layer.get_submodule(EXPERTS)
        wrappers = [outer, outer.base_layer] if hasattr(outer, "base_layer") else []
        experts = place_before(wrappers[-1].base_layer if wrappers else outer, MaskedChannels)
        experts.start()
        if [wrapper.parameter_name for wrapper in wrappers] not in ([], [*reversed(STACKED)]):
            raise RuntimeError("PEFT wraps the weights of experts in another order than a cut expects: use peft<0.22")
        for wrapper in wrappers:
            vars(experts)["adapters"][wrapper.parameter_name] = place_before(wrapper, ExpertAdapter)
        place_before(layer.get_submodule("mlp"), MaskedExperts)


def unmask_experts(layer: nn.Module, family: ExpertFamily) -> None:
    """Gives router and experts their own classes back."""
    for module in (layer.get_submodule(name) for name in (family.router, EXPERTS, "mlp")):
        if isinstance(module, (MaskedRouter, MaskedChannels, MaskedExperts)):
            module.__class__ = type(module).__bases__[1]
            vars(module).pop("adapters", None)
