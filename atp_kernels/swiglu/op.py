"""The gated MLP as one autograd Function over the linears' backends; `masked_lora_swiglu` composes it for a compiler.

h = act(g) * u is computed again in backward: x, the three S and the pre-activations g and u are all that is saved, and
of g and u those before the mask, where its gradient needs these. A mask of the sums is applied with the activation.
"""

from collections.abc import Sequence
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from atp_kernels.call import (
    Operation,
    Order,
    autocast_dtype,
    differentiable_once,
    matrix,
    register,
    select,
    unflattened,
)
from atp_kernels.dropout.op import Drop, drop_of, held
from atp_kernels.kept import operands as kept_operands
from atp_kernels.kept.forms import taken
from atp_kernels.kept.slices import KeptSlice
from atp_kernels.linear import operands as linear_operands
from atp_kernels.linear import shared, ways
from atp_kernels.linear.op import keeps_sum
from atp_kernels.linear.operands import Operands, Options
from atp_kernels.projection import Projection
from atp_kernels.quantized import dense

# What lies between the linears; each of them takes the backend that it takes on its own.
OPERATION = register(
    Operation(
        name="masked_lora_swiglu",
        package=__package__,
        backends=("reference", "triton", "native"),
        # SiLU and product in one pass each way where ATen makes two and four.
        order={"cpu": Order(("native", "reference")), "cuda": Order(("triton", "reference"))},
    )
)

_PER_LINEAR = 4  # weight, lora_a, lora_b, bias


class MlpSpec(NamedTuple):
    """What is no tensor. A scaling, a slice and a backend for each linear: gate, up, down.

    shared: whether gate and up share what they do with x. drops: what makes the adapters' inputs from x and from h.
    sums: to which backward adds the gradients of masks of ones.
    """

    activation: str
    scalings: tuple[float, ...]
    mask_lora: bool
    keep_sum: bool
    kept: tuple[KeptSlice, ...] | None
    backends: tuple[Any, ...]
    between: ModuleType
    shared: bool
    drops: tuple[Drop | None, Drop | None] = (None, None)
    sums: Tensor | None = None


def swiglu(
    x: Tensor,
    linears: tuple[Projection, Projection, Projection],
    kept: tuple[KeptSlice, KeptSlice, KeptSlice] | None,
    activation: str,
    mask: Tensor | None,
    mask_lora: bool,
    dropout: float,
    seeds: tuple[int | Tensor | None, int | Tensor | None],
    backend: str,
    sums: Tensor | None = None,
) -> Tensor:
    """The gated MLP in eager mode; checks and casts the linears' operands."""
    dtype = autocast_dtype(x)
    x = x if dtype is None else x.to(dtype)
    # A shape and a dtype for the checks.
    hidden = x.new_empty(()).expand(*x.shape[:-1], linears[0].weight.shape[0])
    out_mask = in_mask = None
    if kept is not None:
        operands: list[tuple[Tensor | None, ...]] = [
            (None, *kept_operands.prepare(source, slice_, linear.lora_a, linear.lora_b, None)[2:4], None)
            for source, slice_, linear in zip((x, x, hidden), kept, linears, strict=True)
        ]
        choice = select("kept_lora_linear", x.device, x.dtype, backend)
        forms = [
            taken(slice_, source, len(linear.lora_a), backend)
            for source, slice_, linear in zip((x, x, hidden), kept, linears, strict=True)
        ]
        slices: tuple[KeptSlice, ...] | None = tuple(slice_ for slice_, _ in forms)
        tuned = [module for _, module in forms]
    else:
        slices = None
        alike = mask_lora or mask is None
        prepared = [
            linear_operands.prepare(
                Operands(source, p.weight, p.lora_a, p.lora_b, p.bias, out_mask=covers_out, in_mask=covers_in),
                merge=float(p.scaling) if alike and not dropout else None,
                backend=backend,
            )
            for p, source, covers_out, covers_in in zip(
                linears, (x, x, hidden), (mask, mask, None), (None, None, None if mask_lora else mask), strict=True
            )
        ]
        operands, out_mask, in_mask = [given[1:5] for given in prepared], prepared[0].out_mask, prepared[-1].in_mask
        # Where the mask covers the sums it is applied between the linears, none of which has a mask then.
        choice = select("masked_lora_linear", x.device, x.dtype, backend, plain=alike)
        tuned = [
            ways.backend_in_table(given, len(linear.lora_a)) if backend == "auto" and not dropout else None
            for given, linear in zip(prepared, linears, strict=True)
        ]
    between = select("masked_lora_swiglu", x.device, x.dtype, backend).module
    scalings = tuple(float(linear.scaling) for linear in linears)
    backends = tuple(choice.module if module is None else module for module in tuned)
    together = choice.name == "reference" and backends[0] is backends[1] is choice.module
    together &= shared.may_share(scalings[:2], None if slices is None else slices[:2])
    if slices is None:
        together &= (mask_lora or out_mask is None) and not any(map(shared.trains, prepared[:2]))
    keep_sum = not mask_lora and keeps_sum(out_mask)
    drops = drop_of(dropout, seeds[0], backend), drop_of(dropout, seeds[1], backend)
    spec = MlpSpec(activation, scalings, mask_lora, keep_sum, slices, backends, between, together, drops, sums)
    return Swiglu.apply(spec, x, out_mask, in_mask, *(tensor for tensors in operands for tensor in tensors))


class _Masked(NamedTuple):
    """A linear as its backend computes it."""

    spec: MlpSpec
    module: Any
    scaling: float
    out_mask: Tensor | None
    in_mask: Tensor | None
    weight: Tensor
    lora_a: Tensor
    lora_b: Tensor
    bias: Tensor | None

    def alone(self, dtype: torch.dtype) -> shared.Linear:
        """Without masks, as one that shares its input."""
        return shared.Linear(dense(self.weight), self.bias, self.lora_a, self.lora_b)

    def forward(self, x: Tensor, keep_sum: bool, adapter_input: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
        weight, masks = dense(self.weight), (self.out_mask, self.in_mask)
        operands = Operands(x, weight, self.lora_a, self.lora_b, self.bias, adapter_input, *masks)
        return self.module.forward(operands, Options(self.scaling, self.spec.mask_lora, keep_sum))

    def backward(
        self,
        grad: Tensor,
        x: Tensor | None,
        adapter_input: Tensor | None,
        s: Tensor | None,
        total: Tensor | None,
        needs: Sequence[bool],
        apart: bool,
    ) -> tuple[Tensor | None, ...]:
        """Gradients of (x, weight, lora_a, lora_b, bias, out_mask, in_mask, adapter_input).

        apart: the adapter read an input of its own, whose gradient is wanted where that of x is.
        """
        saved = linear_operands.Saved(
            x, dense(self.weight), self.lora_a, self.lora_b, adapter_input, self.out_mask, self.in_mask, s, total
        )
        wanted = linear_operands.Needs._make((*needs[:5], apart and needs[0], *needs[5:], not apart))
        grads = self.module.backward(grad, saved, Options(self.scaling, self.spec.mask_lora), wanted)
        return (*grads[:5], *grads[6:], grads[5])


class _Kept(NamedTuple):
    """A linear on its kept slice."""

    module: Any
    kept: KeptSlice
    scaling: float
    lora_a: Tensor
    lora_b: Tensor

    def alone(self, dtype: torch.dtype) -> shared.Linear:
        """As `_Masked.alone`."""
        kept = self.kept
        return shared.Linear(kept.weight(dtype), kept.bias(dtype), self.lora_a, self.lora_b, kept.sides[0])

    def forward(self, x: Tensor, keep_sum: bool, adapter_input: Tensor | None) -> tuple[Tensor, Tensor, None]:
        slices = self.kept.weight(x.dtype), self.kept.bias(x.dtype)
        operands = (x, *slices, self.lora_a, self.lora_b, adapter_input, *self.kept.sides, self.scaling)
        return *self.module.forward(kept_operands.Operands(*operands)), None

    def backward(
        self,
        grad: Tensor,
        x: Tensor | None,
        adapter_input: Tensor | None,
        s: Tensor | None,
        total: None,
        needs: Sequence[bool],
        apart: bool,
    ) -> tuple[Tensor | None, ...]:
        """As `_Masked.backward`."""
        factors = self.kept.weight(grad.dtype), self.lora_a, self.lora_b
        saved = kept_operands.Saved(*factors, adapter_input if apart else x, s, *self.kept.sides, self.scaling)
        wanted = kept_operands.Needs(needs[0], needs[2], needs[3], apart and needs[0], not apart)
        d_x, d_a, d_b, d_adapter = self.module.backward(grad, saved, wanted)
        return d_x, None, d_a, d_b, None, None, None, d_adapter


def _linears(
    spec: MlpSpec, out_mask: Tensor | None, in_mask: Tensor | None, operands: Sequence[Any]
) -> Sequence[_Masked | _Kept]:
    """Gate, up and down, each from its (weight, lora_a, lora_b, bias)."""
    own = [operands[i : i + _PER_LINEAR] for i in range(0, len(operands), _PER_LINEAR)]
    if spec.kept is not None:
        each = zip(spec.backends, spec.kept, spec.scalings, own, strict=True)
        return [_Kept(module, kept, scaling, *tensors[1:3]) for module, kept, scaling, tensors in each]
    base_mask = None if spec.mask_lora else out_mask
    masks = ((base_mask, None), (base_mask, None), (None, in_mask))
    return [
        _Masked(spec, module, scaling, *covers, *tensors)
        for module, scaling, covers, tensors in zip(spec.backends, spec.scalings, masks, own, strict=True)
    ]


class Swiglu(torch.autograd.Function):
    """(spec, x, out_mask, in_mask, then weight, lora_a, lora_b, bias of gate, up and down) -> y."""

    @staticmethod
    def forward(ctx, spec, x, out_mask, in_mask, *operands):
        ctx.spec, ctx.shape = spec, x.shape
        needs = ctx.needs_input_grad[4:]
        rows, (drop_x, drop_h) = matrix(x), spec.drops
        *producers, down = _linears(spec, out_mask, in_mask, operands)
        dropped = None if drop_x is None else drop_x(rows)
        if spec.shared:
            alone = [linear.alone(x.dtype) for linear in producers]
            values, parts = shared.forward(rows, alone, spec.scalings[0], dropped)
            results = list(zip(values, parts, (None, None), strict=True))
        else:
            results = [linear.forward(rows, spec.keep_sum, dropped) for linear in producers]
        del dropped
        sum_mask = out_mask if spec.mask_lora else None
        h = spec.between.gated(spec.activation, *(value for value, _, _ in results), sum_mask)
        y, s, _ = down.forward(h, False, None if drop_h is None else drop_h(h))
        read_x = any(needs[i] or needs[i + 1] for i in range(0, 2 * _PER_LINEAR, _PER_LINEAR))
        saved = []
        for i, (value, own_s, total) in enumerate(results):
            saved += [value, own_s if needs[_PER_LINEAR * i + 2] else None, total]
        s = s if needs[-2] else None
        seeds = held(drop_x), held(drop_h)
        ctx.save_for_backward(*seeds, rows if read_x else None, out_mask, in_mask, *operands, *saved, s)
        return unflattened(y, x.shape)

    @staticmethod
    @differentiable_once
    def backward(ctx, grad_y):
        spec, (_, need_x, need_out, need_in, *needs) = ctx.spec, ctx.needs_input_grad
        _, _, x, out_mask, in_mask, *rest, s = ctx.saved_tensors
        drop_x, drop_h = spec.drops
        operands, saved = rest[: len(needs)], rest[len(needs) :]
        *producers, down = _linears(spec, out_mask, in_mask, operands)
        gate, up = saved[:6:3]
        sum_mask = out_mask if spec.mask_lora else None
        need_base = need_out and not spec.mask_lora
        upstream = need_x or need_out or any(needs[:-_PER_LINEAR])
        need_h = needs[-4] or needs[-3] or need_in
        h = spec.between.gated(spec.activation, gate, up, sum_mask) if need_h else None
        down_needs = (upstream, *needs[-_PER_LINEAR:], False, need_in)
        dropped = drop_h(h) if drop_h is not None and needs[-3] else None
        d_h, *d_down, _, d_in, d_dropped = down.backward(
            matrix(grad_y), h, dropped, s, None, down_needs, drop_h is not None
        )
        del h, dropped
        if not upstream:
            return None, None, None, d_in, *[None] * (2 * _PER_LINEAR), *d_down
        if drop_h is not None:
            d_h.add_(drop_h(d_dropped))
        grads = [d_h, torch.empty_like(d_h)]  # that of gate takes the memory of d_h
        need_sum = need_out and spec.mask_lora
        d_out = spec.between.gated_backward(spec.activation, d_h, gate, up, *grads, sum_mask, need_sum, spec.sums)
        del gate, up, d_h, d_dropped
        d_x = d_dropped = None
        d_operands = []
        if spec.shared:
            alone, of_both = [linear.alone(grad_y.dtype) for linear in producers], needs[: 2 * _PER_LINEAR]
            options = spec.scalings[0], need_x, of_both[1::_PER_LINEAR], of_both[2::_PER_LINEAR]
            d_x, d_a, d_b = shared.backward(grads, x, saved[1::3], alone, *options, drop_x)
            for a, b in zip(d_a, d_b, strict=True):
                d_operands += (None, a, b, None)
            producers = []
        dropped = drop_x(x) if producers and drop_x is not None and (needs[1] or needs[_PER_LINEAR + 1]) else None
        for i, linear in enumerate(producers):
            own = needs[_PER_LINEAR * i : _PER_LINEAR * (i + 1)]
            own_s, total = saved[3 * i + 1 : 3 * i + 3]
            wanted = (need_x, *own, need_base, False)
            found = linear.backward(grads.pop(0), x, dropped, own_s, total, wanted, drop_x is not None)
            d_x, d_out, d_dropped = _sum(d_x, found[0]), _sum(d_out, found[5]), _sum(d_dropped, found[7])
            d_operands += found[1:5]
        if d_dropped is not None:
            d_x.add_(drop_x(d_dropped))
        d_x = None if d_x is None else d_x.view(ctx.shape)
        return None, d_x, d_out, d_in, *d_operands, *d_down


def _sum(total: Tensor | None, term: Tensor | None) -> Tensor | None:
    return total if term is None else term if total is None else total.add_(term)
