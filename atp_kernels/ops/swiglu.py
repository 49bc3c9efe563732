"""The gated MLP as one autograd Function over the backends' linears; under torch.compile blocks.py composes it.

h = act(g) * u is computed again in backward: x, the three S and the pre-activations g and u are all that is saved, and
of g and u those that the mask was not yet applied to, where its gradient needs these.
"""

from collections.abc import Sequence
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from atp_kernels.backends.primitives import masked
from atp_kernels.call import matrix
from atp_kernels.slices import KeptSlice

_OPERANDS = 4


class MlpSpec(NamedTuple):
    """What is no tensor. One scaling and slice for each linear: gate, up, down, or [gate, up] stacked and down."""

    activation: str
    scalings: tuple[float, ...]
    mask_lora: bool
    keep_sum: bool
    kept: tuple[KeptSlice, ...] | None
    module: ModuleType


class _Masked(NamedTuple):
    """A linear as its backend computes it."""

    spec: MlpSpec
    scaling: float
    out_mask: Tensor | None
    in_mask: Tensor | None
    weight: Tensor
    lora_a: Tensor
    lora_b: Tensor
    bias: Tensor | None

    def forward(self, x: Tensor, keep_sum: bool) -> tuple[Tensor, Tensor, Tensor | None]:
        operands = (self.weight, self.lora_a, self.lora_b, self.bias, None, self.out_mask, self.in_mask)
        options = (self.scaling, self.spec.mask_lora, keep_sum, False)
        return self.spec.module.masked_lora_linear_forward(x, *operands, *options)[:3]

    def backward(
        self, grad: Tensor, x: Tensor | None, down: Tensor | None, total: Tensor | None, needs: Sequence[bool]
    ):
        """Gradients of (x, weight, lora_a, lora_b, bias, out_mask, in_mask)."""
        saved = (x, self.weight, self.lora_a, self.lora_b, None, self.out_mask, self.in_mask, down, total)
        options = (self.scaling, self.spec.mask_lora, True, (*needs[:5], False, *needs[5:]))
        grads = self.spec.module.masked_lora_linear_backward(grad, *saved, *options)
        return (*grads[:5], *grads[6:])


class _Kept(NamedTuple):
    """A linear on its kept slice."""

    module: ModuleType
    kept: KeptSlice
    scaling: float
    lora_a: Tensor
    lora_b: Tensor

    def forward(self, x: Tensor, keep_sum: bool) -> tuple[Tensor, Tensor, None]:
        slices = self.kept.weight(x.dtype), self.kept.bias(x.dtype)
        tensors = (x, *slices, self.lora_a, self.lora_b, None)
        return *self.module.kept_lora_linear_forward(*tensors, *self.kept.sides, self.scaling), None

    def backward(self, grad: Tensor, x: Tensor | None, down: Tensor | None, total: None, needs: Sequence[bool]):
        saved = (self.kept.weight(grad.dtype), self.lora_a, self.lora_b, x, down, *self.kept.sides)
        wanted = (needs[0], needs[2], needs[3], False)
        d_x, d_a, d_b, _ = self.module.kept_lora_linear_backward(grad, *saved, self.scaling, True, wanted)
        return d_x, None, d_a, d_b, None, None, None


def _linears(spec: MlpSpec, out_mask: Tensor | None, in_mask: Tensor | None, operands: Sequence[Tensor | None]):
    """Producers, then the consumer, each from its (weight, lora_a, lora_b, bias)."""
    linears = []
    for i, scaling in enumerate(spec.scalings):
        own = operands[_OPERANDS * i : _OPERANDS * (i + 1)]
        if spec.kept is not None:
            linears.append(_Kept(spec.module, spec.kept[i], scaling, *own[1:3]))
        else:
            last = i == len(spec.scalings) - 1
            masks = (None, in_mask) if last else (out_mask, None)
            linears.append(_Masked(spec, scaling, *masks, *own))
    return linears


def _halves(values: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Those of gate and those of up."""
    return values[0].chunk(2, dim=1) if len(values) == 1 else values


def _product(spec: MlpSpec, values: Sequence[Tensor]) -> Tensor:
    return spec.module.gated(spec.activation, *_halves(values))


def _producer_grads(spec: MlpSpec, values: Sequence[Tensor], d_h: Tensor) -> list[Tensor]:
    """Gradients of the producers' outputs; that of gate in the memory of d_h unless they are stacked."""
    grads = [torch.empty_like(values[0])] if len(values) == 1 else [d_h, torch.empty_like(d_h)]
    spec.module.gated_backward(spec.activation, d_h, *_halves(values), *_halves(grads))
    return grads


class Swiglu(torch.autograd.Function):
    """(spec, x, out_mask, in_mask, then weight, lora_a, lora_b, bias of each linear) -> y."""

    @staticmethod
    def forward(ctx, spec, x, out_mask, in_mask, *operands):
        ctx.spec, ctx.shape = spec, x.shape
        needs = ctx.needs_input_grad[4:]
        rows = matrix(x)
        *producers, down = _linears(spec, out_mask, in_mask, operands)
        results = [linear.forward(rows, spec.keep_sum) for linear in producers]
        y, low, _ = down.forward(_product(spec, [y for y, _, _ in results]), False)
        read_x = any(needs[i] or needs[i + 1] for i in range(0, len(needs) - _OPERANDS, _OPERANDS))
        saved = []
        for i, (value, own_low, total) in enumerate(results):
            # Where the mask covers the sum, the masked sum is a product away from the one that its gradient needs.
            masked_later = total is not None and spec.mask_lora
            saved += [None if masked_later else value, own_low if needs[_OPERANDS * i + 2] else None, total]
        low = low if needs[-2] else None
        ctx.save_for_backward(rows if read_x else None, out_mask, in_mask, *operands, *saved, low)
        return y.view(*x.shape[:-1], y.shape[-1])

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_y):
        spec, (_, need_x, need_out, need_in, *needs) = ctx.spec, ctx.needs_input_grad
        x, out_mask, in_mask, *rest, low = ctx.saved_tensors
        operands, saved = rest[: len(needs)], rest[len(needs) :]
        *producers, down = _linears(spec, out_mask, in_mask, operands)
        values = [masked(total, out_mask) if y is None else y for y, total in zip(saved[::3], saved[2::3], strict=True)]
        upstream = need_x or need_out or any(needs[:-_OPERANDS])
        h = _product(spec, values) if needs[-4] or needs[-3] or need_in else None
        down_needs = (upstream, *needs[-_OPERANDS:], False, need_in)
        grad_y = matrix(grad_y)
        d_h, *d_down, _, d_in = down.backward(grad_y, h, low, None, down_needs)
        del h
        grads = _producer_grads(spec, values, d_h) if upstream else []
        del values, d_h
        d_x = d_out = None
        d_operands = []
        for i, linear in enumerate(producers):
            own = needs[_OPERANDS * i : _OPERANDS * (i + 1)]
            if not upstream:
                d_operands += [None] * _OPERANDS
                continue
            found = linear.backward(grads.pop(0), x, *saved[3 * i + 1 : 3 * i + 3], (need_x, *own, need_out, False))
            d_x, d_out = _sum(d_x, found[0]), _sum(d_out, found[5])
            d_operands += found[1:5]
        d_x = None if d_x is None else d_x.view(ctx.shape)
        return None, d_x, d_out, d_in, *d_operands, *d_down


def _sum(total: Tensor | None, term: Tensor | None) -> Tensor | None:
    return term if total is None else total.add_(term)
