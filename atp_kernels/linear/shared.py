"""LoRA linears of one input in ATen calls, with their adapters as one.

With A = [A_1; A_2; ..] and P = [P_1, P_2, ..], the products S = scaling * x A^T, P A and dA = P^T x are one each
instead of one per linear, and every linear adds its part of dx to those before it, so that no sum of gradients is left
to autograd. The vendor's products of the bases are those of `kept.aten`, of whole weights or of what their slices keep.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from atp_kernels.call import autocast_dtype, differentiable_once, matrix, select, unflattened
from atp_kernels.dropout.op import Drop, drop_of, held
from atp_kernels.kept import operands as kept_operands
from atp_kernels.kept.aten import ATEN, in_order, ordered, product
from atp_kernels.kept.forms import taken
from atp_kernels.kept.sides import Side
from atp_kernels.kept.slices import KeptSlice
from atp_kernels.linear import ways
from atp_kernels.linear.aten import scaled_mm
from atp_kernels.linear.operands import Operands, prepare
from atp_kernels.quantized import dense


class Linear(NamedTuple):
    """A frozen base with its adapter. outs: how its outputs relate to the weight's rows, None where they are these."""

    weight: Tensor
    bias: Tensor | None
    lora_a: Tensor
    lora_b: Tensor
    outs: Side | None = None


def forward(
    x: Tensor, linears: Sequence[Linear], scaling: float, adapter_input: Tensor | None = None
) -> tuple[list[Tensor], list[Tensor]]:
    """(y [M, out] of each, its S [M, r]) for x [M, in]; adapter_input: what the adapters read, None for x."""
    read = x if adapter_input is None else adapter_input
    s = scaled_mm(read, torch.cat([linear.lora_a for linear in linears]).t(), scaling)
    parts = s.split([len(linear.lora_a) for linear in linears], 1)
    results = []
    for linear, part in zip(linears, parts, strict=True):
        high = ordered(linear.lora_b, linear.outs, 0).t()
        weight = linear.weight.t()
        results.append(product(x, weight, linear.bias, None, linear.outs, part, high, x.numel(), ATEN))
    return results, list(parts)


def backward(
    grads: Sequence[Tensor],
    x: Tensor | None,
    parts: Sequence[Tensor | None],
    linears: Sequence[Linear],
    scaling: float,
    need_x: bool,
    need_a: Sequence[bool],
    need_b: Sequence[bool],
    drop: Drop | None = None,
) -> tuple[Tensor | None, list[Tensor | None], list[Tensor | None]]:
    """(dx, dA of each, dB of each), None where not needed; parts: the S of those that need dB.

    drop: what made the adapters' input from x. It makes that again, and the adapters' part of dx from one gradient.
    """
    ranks = [len(linear.lora_a) for linear in linears]
    d_x, d_b = None, []
    up = grads[0].new_empty(len(grads[0]), sum(ranks))
    if need_x or any(need_a):
        for grad, linear, own in zip(grads, linears, up.split(ranks, 1), strict=True):
            own.addmm_(grad, ordered(linear.lora_b, linear.outs, 0), beta=0, alpha=scaling)
    if need_x:
        # The adapters' part first, to which the bases' products add theirs.
        d_x = torch.mm(up, torch.cat([linear.lora_a for linear in linears]))
        d_x = d_x if drop is None else drop(d_x)
        for grad, linear in zip(grads, linears, strict=True):
            d_x.addmm_(_kept(grad, linear), linear.weight)
    for grad, linear, part, need in zip(grads, linears, parts, need_b, strict=True):
        d_b.append(in_order(grad.t() @ part, linear.outs) if need and part is not None else None)
    d_a: list[Tensor | None] = [None] * len(linears)
    if any(need_a) and x is not None:
        each = (up.t() @ (x if drop is None else drop(x))).split(ranks)
        d_a = [part if need else None for part, need in zip(each, need_a, strict=True)]
    return d_x, d_a, d_b


def _kept(grad: Tensor, linear: Linear) -> Tensor:
    """The gradient of what the slice computes."""
    if linear.outs is None:
        return grad
    if linear.outs.kept_first:
        return grad[:, : len(linear.weight)]
    taken = grad.new_empty(len(grad), len(linear.outs.index))
    ATEN.take_columns(grad, linear.outs.index, taken)
    return taken


def shared_linears(
    x: Tensor,
    given: Sequence[tuple[Tensor, Tensor, Tensor, float, Tensor | None]],
    kept: Sequence[KeptSlice] | None,
    backend: str,
    dropout: float = 0.0,
    seed: int | Tensor | None = None,
) -> tuple[Tensor, ...] | None:
    """y of each (weight, lora_a, lora_b, scaling, bias) or slice without masks beside it, None where not worth it.

    It is where the vendor's products are the backend and bases are frozen, and scalings equal. A tuned table that knows
    a faster way for one of them takes them apart. dropout, seed: of what all adapters read, checked. Raises what the
    linears do.
    """
    if torch.compiler.is_compiling() or not may_share([linear[3] for linear in given], kept):
        return None
    dtype = autocast_dtype(x)
    x = x if dtype is None else x.to(dtype)
    tensors: list[Tensor | None] = []
    if kept is not None:
        choice = select("kept_lora_linear", x.device, x.dtype, backend)
        if choice.name != "reference":
            return None
        for slice_, (_, lora_a, lora_b, _, _) in zip(kept, given, strict=True):
            _, _, lora_a, lora_b, _ = kept_operands.prepare(x, slice_, lora_a, lora_b, None)
            tensors += (None, None, lora_a, lora_b)
        forms = [taken(slice_, x, len(linear[1]), backend) for slice_, linear in zip(kept, given, strict=True)]
        if any(module not in (None, choice.module) for _, module in forms):
            return None
        kept = [slice_ for slice_, _ in forms]
    else:
        if select("masked_lora_linear", x.device, x.dtype, backend, plain=True).name != "reference":
            return None
        for weight, lora_a, lora_b, _, bias in given:
            operands = prepare(Operands(x, weight, lora_a, lora_b, bias), backend=backend)
            way = ways.way_of(operands, len(lora_a), False) if backend == "auto" and not dropout else None
            if trains(operands) or (way is not None and way.name != "reference"):
                return None
            tensors += (operands.weight, operands.bias, operands.lora_a, operands.lora_b)
    drop = drop_of(dropout, seed, backend)
    results: tuple[Tensor, ...] = SharedLinears.apply(kept, float(given[0][3]), drop, x, *tensors)
    return results


def may_share(scalings: Sequence[float], kept: Sequence[KeptSlice] | None) -> bool:
    """Whether linears of one input can share what they do with it."""
    return len(set(map(float, scalings))) == 1 and all(slice_.sides[1] is None for slice_ in kept or ())


def trains(operands: Operands) -> bool:
    """Whether the base has a gradient."""
    bases = operands.weight, operands.bias
    return torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in bases)


class SharedLinears(torch.autograd.Function):
    """(slices or None, scaling, drop or None, x, then weight, bias, lora_a, lora_b of each linear) -> y of each.

    Weights and biases are frozen; those of a slice stand in for the given ones. x and the S are all that is saved.
    """

    @staticmethod
    def forward(ctx, kept, scaling, drop, x, *tensors):
        rows = matrix(x)
        linears = _linears(kept, rows.dtype, tensors)
        results, parts = forward(rows, linears, scaling, None if drop is None else drop(rows))
        needs = ctx.needs_input_grad[4:]
        ctx.drop, ctx.kept, ctx.scaling, ctx.shape, ctx.dtype = drop, kept, scaling, x.shape, rows.dtype
        saved = [part if need else None for part, need in zip(parts, needs[3::4], strict=True)]
        ctx.save_for_backward(held(drop), rows if any(needs[2::4]) else None, *saved, *tensors)
        return tuple(unflattened(y, x.shape) for y in results)

    @staticmethod
    @differentiable_once
    def backward(ctx, *grads):
        _, x, *rest = ctx.saved_tensors
        count, (_, _, _, need_x, *needs) = len(grads), ctx.needs_input_grad
        linears = _linears(ctx.kept, ctx.dtype, rest[count:])
        rows = [matrix(grad) for grad in grads]
        wanted = need_x, needs[2::4], needs[3::4]
        d_x, d_a, d_b = backward(rows, x, rest[:count], linears, ctx.scaling, *wanted, ctx.drop)
        each = [part for a, b in zip(d_a, d_b, strict=True) for part in (None, None, a, b)]
        return None, None, None, None if d_x is None else d_x.view(ctx.shape), *each


def _linears(kept: Sequence[KeptSlice] | None, dtype: torch.dtype, tensors: Sequence[Any]) -> list[Linear]:
    own = [tensors[i : i + 4] for i in range(0, len(tensors), 4)]
    if kept is None:
        return [Linear(dense(weight), *others) for weight, *others in own]
    return [
        Linear(slice_.weight(dtype), slice_.bias(dtype), lora_a, lora_b, slice_.sides[0])
        for slice_, (_, _, lora_a, lora_b) in zip(kept, own, strict=True)
    ]
