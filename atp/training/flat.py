"""The trained parameters as one flat tensor: one optimizer step, one clip and one check for all of them.

An adapter is hundreds of small tensors. Whatever goes over them one by one costs more calls than arithmetic.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from atp.ground.errors import InputError

BLOCK = 256
"""Elements to whose multiple zeros fill up each parameter, so that a block of so many belongs to one parameter."""


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
        """The inverse of `state_of`; learning rates and other group options stay as they are."""
        state: dict[str, Tensor] = {}
        places: dict[str, dict[str, Tensor]] = {}
        for name, tensor in tensors.items():
            parameter, _, key = name.rpartition(".")
            if key == "step":
                state[key] = tensor
                continue
            if key not in state:
                state[key] = torch.zeros_like(self.flat, requires_grad=False)
                places[key] = dict(zip(self.parameters, self.views(state[key]), strict=True))
            places[key][parameter].copy_(tensor)
        groups = optimizer.state_dict()["param_groups"]
        optimizer.load_state_dict({"state": {0: state} if state else {}, "param_groups": groups})
