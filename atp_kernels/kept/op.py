"""torch.library registration and eager Function of the LoRA linear on a kept slice."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from atp_kernels.call import Operation, Order, differentiable_once, matrix, refuse_twice, register, select, unflattened
from atp_kernels.dropout.op import drop_of, dropped, held
from atp_kernels.kept import forms
from atp_kernels.kept.operands import Needs, Operands, Saved
from atp_kernels.kept.sides import Side
from atp_kernels.kept.slices import KeptSlice

OPERATION = register(
    Operation(
        name="kept_lora_linear",
        package=__package__,
        backends=("reference", "triton", "native"),
        # Its products are the vendor's in every backend; what a CPU does in C++ around them is ATen's elsewhere.
        order={"cpu": Order(("native", "reference"))},
        explained=forms.explained,
        explained_by=3,
    )
)


def kept_linear(
    x: Tensor,
    kept: KeptSlice,
    lora_a: Tensor,
    lora_b: Tensor,
    lora_input: Tensor | None,
    scaling: float,
    backend: str,
    module: Any = None,
    dropout: float = 0.0,
    seed: int | Tensor | None = None,
) -> Tensor:
    """LoRA linear on a kept slice, checked and cast. module: the backend, where a tuned table says it."""
    if not torch.compiler.is_compiling():
        module = module or select("kept_lora_linear", x.device, x.dtype, backend).module
        drop = drop_of(dropout, seed, backend)
        return KeptLoraLinear.apply(x, lora_a, lora_b, lora_input, kept, module, scaling, drop)
    if dropout and seed is not None:  # a compiler decides what is saved
        lora_input = dropped(x, dropout, seed, backend)
    rows = matrix(x)
    adapter = None if lora_input is None else matrix(lora_input)
    slices = kept.weight(x.dtype), kept.bias(x.dtype)
    y, _ = kept_lora_linear_op(rows, *slices, lora_a, lora_b, adapter, *flat(kept.sides), scaling, backend)
    return y.view(*x.shape[:-1], kept.out_features)


def flat(sides: tuple[Side | None, Side | None]) -> tuple[Tensor | None | bool, ...]:
    """Two sides as an operator takes them."""
    outs, ins = ((None, None, False) if side is None else (side.index, side.place, side.kept_first) for side in sides)
    return *outs, *ins


def _sides(parts: Sequence[Any]) -> tuple[Side | None, Side | None]:
    """The inverse of `flat`."""
    outs, ins = (None if part[0] is None else Side(*part) for part in (parts[:3], parts[3:]))
    return outs, ins


@torch.library.custom_op("atp_kernels::kept_lora_linear", mutates_args=())
def kept_lora_linear_op(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_a: Tensor,
    lora_b: Tensor,
    lora_input: Tensor | None,
    out_index: Tensor | None,
    out_place: Tensor | None,
    out_kept_first: bool,
    in_index: Tensor | None,
    in_place: Tensor | None,
    in_kept_first: bool,
    scaling: float,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """2-D LoRA linear on a kept slice: (y, S)."""
    sides = _sides((out_index, out_place, out_kept_first, in_index, in_place, in_kept_first))
    module = select("kept_lora_linear", x.device, x.dtype, backend).module
    return module.forward(Operands(x, weight, bias, lora_a, lora_b, lora_input, *sides, scaling))


@kept_lora_linear_op.register_fake
def _(x, weight, bias, lora_a, lora_b, *rest):
    return x.new_empty(x.shape[0], lora_b.shape[0]), x.new_empty(x.shape[0], lora_a.shape[0])


@torch.library.custom_op("atp_kernels::kept_lora_linear_backward", mutates_args=())
def kept_lora_linear_backward_op(
    grad_y: Tensor,
    weight: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    adapter_input: Tensor | None,
    s: Tensor | None,
    out_index: Tensor | None,
    out_place: Tensor | None,
    out_kept_first: bool,
    in_index: Tensor | None,
    in_place: Tensor | None,
    in_kept_first: bool,
    scaling: float,
    shared_input: bool,
    needs: Sequence[bool],
    backend: str,
) -> list[Tensor]:
    """The wanted gradients, in the order (x, lora_a, lora_b, lora_input)."""
    sides = _sides((out_index, out_place, out_kept_first, in_index, in_place, in_kept_first))
    saved = Saved(weight, lora_a, lora_b, adapter_input, s, *sides, scaling)
    module = select("kept_lora_linear", grad_y.device, grad_y.dtype, backend).module
    grads = module.backward(grad_y, saved, Needs._make((*needs, shared_input)))
    return [grad for grad in grads if grad is not None]


@kept_lora_linear_backward_op.register_fake
def _(grad_y, weight, lora_a, lora_b, *rest):
    wide = (grad_y.shape[0], lora_a.shape[1])
    shapes = (wide, lora_a.shape, lora_b.shape, wide)
    return [grad_y.new_empty(shape) for shape, need in zip(shapes, rest[-2], strict=True) if need]


def _setup(ctx, inputs, output) -> None:
    x, weight, _, lora_a, lora_b, lora_input, *parts, ctx.scaling, ctx.backend = inputs
    need_x, _, _, need_a, need_b, need_adapter = ctx.needs_input_grad[:6]
    ctx.needs = (need_x, need_a, need_b, need_adapter)
    adapter = x if lora_input is None else lora_input
    tensors = (weight, lora_a, lora_b, adapter if need_a else None, output[1] if need_b else None)
    ctx.save_for_backward(*tensors, *(part for part in parts if not isinstance(part, bool)))
    ctx.kept_first, ctx.shared_input = (parts[2], parts[5]), lora_input is None


def _backward(ctx, grad_y, grad_s):
    *saved, out_index, out_place, in_index, in_place = ctx.saved_tensors
    out_first, in_first = ctx.kept_first
    parts = (out_index, out_place, out_first, in_index, in_place, in_first)
    options = (ctx.scaling, ctx.shared_input, list(ctx.needs), ctx.backend)
    wanted = iter(kept_lora_linear_backward_op(grad_y, *saved, *parts, *options))
    d_x, d_a, d_b, d_adapter = (next(wanted) if need else None for need in ctx.needs)
    return d_x, None, None, d_a, d_b, d_adapter, *[None] * 8


kept_lora_linear_op.register_autograd(_backward, setup_context=_setup)
kept_lora_linear_backward_op.register_autograd(refuse_twice)


class KeptLoraLinear(torch.autograd.Function):
    """Eager LoRA linear on a kept slice, which is not saved but kept by reference. drop: makes lora_input, or None."""

    @staticmethod
    def forward(ctx, x, lora_a, lora_b, lora_input, kept, module, scaling, drop):
        _, need_a, need_b, _ = ctx.needs_input_grad[:4]
        ctx.kept, ctx.module, ctx.scaling, ctx.drop = kept, module, scaling, drop
        ctx.shape, ctx.shared_input = x.shape, lora_input is None
        rows = matrix(x)
        given = None if lora_input is None else matrix(lora_input)
        adapter = given if drop is None else drop(rows)
        slices = kept.weight(x.dtype), kept.bias(x.dtype)
        y, s = module.forward(Operands(rows, *slices, lora_a, lora_b, adapter, *kept.sides, scaling))
        read = rows if given is None else given
        ctx.save_for_backward(lora_a, lora_b, read if need_a else None, s if need_b else None, held(drop))
        return unflattened(y, x.shape)

    @staticmethod
    @differentiable_once
    def backward(ctx, grad_y):
        grad_y, drop = matrix(grad_y), ctx.drop
        lora_a, lora_b, read, s, _ = ctx.saved_tensors
        needs = Needs._make((*ctx.needs_input_grad[:4], ctx.shared_input))
        if drop is not None:
            read = None if read is None else drop(read)
            needs = needs._replace(lora_input=needs.x, shared_input=False)
        weight = ctx.kept.weight(grad_y.dtype)
        d_x, d_a, d_b, d_adapter = ctx.module.backward(
            grad_y, Saved(weight, lora_a, lora_b, read, s, *ctx.kept.sides, ctx.scaling), needs
        )
        if drop is not None and needs.x:
            del read  # there is room for one of x's size again
            d_x, d_adapter = d_x.add_(drop(d_adapter)), None
        d_x, d_adapter = (grad if grad is None else grad.view(ctx.shape) for grad in (d_x, d_adapter))
        return d_x, d_a, d_b, d_adapter, None, None, None, None
