"""The trained parameters as one flat tensor: one optimizer step, clip, check and cast for all of them.

An adapter is hundreds of small tensors. Whatever goes over them one by one costs more calls than arithmetic.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import cast

import torch
from torch import Tensor, nn

from atp.ground.errors import InputError
from atp.lora.layer import ADAPTER, MaskedPeftLinear

BLOCK = 256
"""Elements to whose multiple zeros fill up each parameter, so that a block of so many belongs to one parameter."""

CASTS_ON = ("cuda",)
"""The types of device where all factors are cast at once. On a CPU, packs cast those that they read."""


class FlatParameters:
    """Makes parameters of one dtype and device views of `flat` [blocks * BLOCK], and their gradients views of its own.

    The parameters stay what they are, in their modules and under their names, with the same values. Gradients are never
    None: `zero_grad` fills them with zeros where they lie, and takes back parameters and gradients that were moved.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter]) -> None:
        """Raises `InputError` for none, and for more than one dtype."""
        if not parameters:
            raise InputError("the model has no trainable parameter: nothing can be trained")
        kinds = sorted({str(p.dtype).removeprefix("torch.") for p in parameters.values()})
        if len(kinds) > 1:
            raise InputError(f"the adapter has parameters of {' and '.join(kinds)}: cast it to one dtype")
        self.parameters = dict(parameters)
        self.sizes = [-(-p.numel() // BLOCK) * BLOCK for p in parameters.values()]
        like = next(iter(parameters.values())).detach()
        self.flat = nn.Parameter(like.new_zeros(sum(self.sizes)))
        self.flat.grad = torch.zeros_like(self.flat)
        self.owner = torch.arange(len(self.sizes)).repeat_interleave(torch.tensor(self.sizes) // BLOCK).to(like.device)
        self._values, self._grads = self.views(self.flat.detach()), self.views(self.flat.grad)
        self._attach()

    def views(self, flat: Tensor) -> list[Tensor]:
        """The part of each parameter in a flat tensor, in its shape."""
        parts = flat.split(self.sizes)
        return [part[: p.numel()].view(p.shape) for part, p in zip(parts, self.parameters.values(), strict=True)]

    def zero_grad(self) -> None:
        """Fills the gradients with zeros."""
        assert self.flat.grad is not None
        self.flat.grad.zero_()
        self._attach()

    def _attach(self) -> None:
        # Again after each step: what a module's zero_grad or `to` takes out of here would never be trained again.
        for p, values, grad in zip(self.parameters.values(), self._values, self._grads, strict=True):
            if p.data_ptr() != values.data_ptr():
                values.copy_(p.detach())
                p.data = values
            p.grad = grad

    def sum_by_parameter(self, blocks: Tensor) -> Tensor:
        """Sums of [blocks] over the blocks of each parameter, [parameters], the same in every run."""
        sums = blocks.new_zeros(len(self.sizes))
        if blocks.device.type == "cpu":
            return sums.index_add_(0, self.owner, blocks)
        # Sorts first; `index_add_` would add as threads come.
        return sums.index_put_((self.owner,), blocks, accumulate=True)

    def state_of(self, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
        """State of an optimizer of `flat` as `<parameter name>.<state name>`; empty before its first step."""
        found: dict[str, Tensor] = {}
        for key, value in optimizer.state[self.flat].items():
            each = [value] * len(self.sizes) if key == "step" else self.views(value)
            found |= {f"{name}.{key}": part for name, part in zip(self.parameters, each, strict=True)}
        return found

    def load_state(self, optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor]) -> None:
        """The inverse of `state_of`; learning rates, other group options and other parameters stay as they are."""
        state: dict[str, Tensor] = {}
        places: dict[str, dict[str, Tensor]] = {}
        for name, tensor in tensors.items():
            parameter, _, key = name.rpartition(".")
            if parameter not in self.parameters:
                continue
            if key == "step":
                state[key] = tensor
                continue
            if key not in state:
                state[key] = torch.zeros_like(self.flat, requires_grad=False)
                places[key] = dict(zip(self.parameters, self.views(state[key]), strict=True))
            places[key][parameter].copy_(tensor)
        held = optimizer.state_dict()
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        (place,) = (index for index, parameter in enumerate(parameters) if parameter is self.flat)
        others = {index: values for index, values in held["state"].items() if index != place}
        optimizer.load_state_dict(held | {"state": others | ({place: state} if state else {})})


class NarrowFactors:
    """LoRA factors in autocast's dtype, cast at once and read instead of the float32 ones in steps under autocast.

    Each layer would cast its own in every pass, and its gradients back: four launches per linear and step.
    """

    def __init__(self, parameters: FlatParameters, modules: Iterable[nn.Module], dtype: torch.dtype) -> None:
        """modules: among them the LoRA layers whose factors are parts of `parameters`."""
        self._parameters = parameters
        self._flat = parameters.flat.detach().to(dtype)
        self._leaves = [part.detach().requires_grad_() for part in parameters.views(self._flat)]
        of = {id(p): leaf for p, leaf in zip(parameters.parameters.values(), self._leaves, strict=True)}
        self._layers: list[tuple[MaskedPeftLinear, tuple[Tensor, Tensor]]] = []
        for module in modules:
            if isinstance(module, MaskedPeftLinear):
                a, b = (cast(nn.Linear, factors[ADAPTER]).weight for factors in (module.lora_A, module.lora_B))
                if id(a) in of and id(b) in of:
                    self._layers.append((module, (of[id(a)], of[id(b)])))
        self._gaps = [
            self._flat.new_zeros(size - p.numel())
            for size, p in zip(parameters.sizes, parameters.parameters.values(), strict=True)
        ]

    @contextmanager
    def read(self) -> Iterator[None]:
        """Layers read these factors in passes that record gradients, inside the with block."""
        for layer, factors in self._layers:
            layer.factors = factors
        try:
            yield
        finally:
            for layer, _ in self._layers:
                layer.factors = None

    @torch.no_grad()
    def refresh(self) -> None:
        """Casts the parameters as they are now."""
        self._flat.copy_(self._parameters.flat)

    @torch.no_grad()
    def collect(self) -> None:
        """Moves what a backward pass left here to the gradients of the parameters, as one addition if all have one."""
        grads = [leaf.grad for leaf in self._leaves]
        for leaf in self._leaves:
            leaf.grad = None
        found = [grad for grad in grads if grad is not None]
        if len(found) == len(grads):
            parts = (part for grad, gap in zip(found, self._gaps, strict=True) for part in (grad.flatten(), gap))
            assert self._parameters.flat.grad is not None
            self._parameters.flat.grad.add_(torch.cat([part for part in parts if part.numel()]))
            return
        for parameter, grad in zip(self._parameters.parameters.values(), grads, strict=True):
            if grad is not None:
                assert parameter.grad is not None
                parameter.grad.add_(grad)
