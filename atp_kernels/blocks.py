"""Whole blocks of a decoder layer over the masked LoRA linears: the gated MLP, and the three projections of attention.

Frozen weights that lie in one storage (`stack_weights`) are multiplied as one: their A's are stacked, their B's are the
blocks of a block-diagonal one, so that one linear reads x once for S, for the base product, for dA and for dx.
"""

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from atp_kernels import kept as kept_slices
from atp_kernels import ops
from atp_kernels.call import select
from atp_kernels.functional import masked_lora_linear, prepare_linear
from atp_kernels.kept import kept_lora_linear
from atp_kernels.reference import Projection
from atp_kernels.slices import KeptSlice


def masked_lora_swiglu(
    x: Tensor,
    gate: Projection,
    up: Projection,
    down: Projection,
    *,
    activation: str = "silu",
    mask: Tensor | None = None,
    mask_lora: bool = False,
    kept: tuple[KeptSlice, KeptSlice, KeptSlice] | None = None,
    backend: str = "auto",
) -> Tensor:
    """down(act(gate(x)) * up(x)), each a masked LoRA linear, with the product recomputed in backward.

    x [..., hidden]; gate and up: weight [channels, hidden], down: weight [hidden', channels], factors and dtypes as in
    `masked_lora_linear`. activation: "silu" or "gelu_tanh". mask [channels], bool or floating: with `mask_lora` on the
    sums of gate and up (decision step), without it on the base paths of all three, at the input of down (LoRA step).
    kept: the slices of gate, up and down instead of a mask, sharing one `KeptFirst` or one bool mask; their weights and
    biases are those that count. Returns [..., hidden'] in the dtype of x. Differentiable once in every floating input
    that requires it. Errors as in `masked_lora_linear` and `kept_lora_linear`.
    Source: arXiv 2412.14426, section 3; Shazeer 2020, "GLU variants improve transformer".
    """
    if activation not in ops.ACTIVATIONS:
        raise ValueError(f"activation is {activation!r}: use one of {', '.join(ops.ACTIVATIONS)}.")
    if gate.weight.shape != up.weight.shape:
        raise ValueError(f"gate {list(gate.weight.shape)} and up {list(up.weight.shape)} need weights of one shape.")
    _check_kept(kept, (mask,), mask_lora)
    if kept is not None and not (kept[0].out_mask is kept[1].out_mask is kept[2].in_mask):
        raise ValueError("the slices of gate and up and the input of down must share one mask or KeptFirst object.")
    options = {"activation": activation, "mask": mask, "mask_lora": mask_lora, "kept": kept, "backend": backend}
    return (_composed if torch.compiler.is_compiling() else _fused)(x, gate, up, down, **options)


def masked_lora_qkv(
    x: Tensor,
    q: Projection,
    k: Projection,
    v: Projection,
    *,
    masks: tuple[Tensor | None, Tensor | None, Tensor | None] = (None, None, None),
    mask_lora: bool = False,
    kept: tuple[KeptSlice, KeptSlice, KeptSlice] | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor, Tensor]:
    """The three projections of attention, each a masked LoRA linear of x; one linear where their weights are stacked.

    x [..., in]; weights [out_q, in], [out_k, in], [out_v, in]; factors and dtypes as in `masked_lora_linear`. masks
    [out_q], [out_k], [out_v]: bool or floating, on the outputs, as `mask_lora` says there. kept: the slices of q, k and
    v instead of masks; their weights and biases are those that count. Returns q [..., out_q], k [..., out_k] and
    v [..., out_v], views of one tensor where the weights are stacked (see `stack_weights`). Differentiable once in
    every floating input that requires it. Errors as in `masked_lora_linear` and `kept_lora_linear`.
    Source: arXiv 2412.14426, section 3.
    """
    _check_kept(kept, masks, mask_lora)
    projections = (q, k, v)
    stacked = None
    if kept is None and not torch.compiler.is_compiling() and all(map(partial(_fits, x), projections, masks)):
        stacked = _stacked(projections)
    if stacked is None:
        slices, common = kept or (None, None, None), {"mask_lora": mask_lora, "backend": backend}
        parts = zip(projections, slices, masks, strict=True)
        return tuple(_linear(x, linear, slice_, out_mask=mask, **common) for linear, slice_, mask in parts)
    widths = [projection.weight.shape[0] for projection in projections]
    if any(mask is not None for mask in masks):
        masks = [
            x.new_ones(n, dtype=torch.bool) if mask is None else mask for n, mask in zip(widths, masks, strict=True)
        ]
        masks = torch.cat(masks)
    else:
        masks = None
    return _linear(x, stacked, None, out_mask=masks, mask_lora=mask_lora, backend=backend).split(widths, dim=-1)


def stack_weights(*weights: Tensor) -> None:
    """Move frozen weights [n_i, in] into one storage, in place: each becomes a view of its rows, no copy is kept.

    Values do not change; views of the old storage made before no longer follow. A later move to another device or dtype
    takes them apart. Raises ValueError for weights that require a gradient or differ in width, dtype or device.
    """
    first = weights[0]
    for weight in weights:
        if weight.ndim != 2 or weight.requires_grad:
            raise ValueError("stack_weights takes frozen 2-D weights: call requires_grad_(False) on them first.")
        if (weight.shape[1], weight.dtype, weight.device) != (first.shape[1], first.dtype, first.device):
            raise ValueError("weights to stack must have one width, dtype and device.")
    storage = torch.cat([weight.detach() for weight in weights])
    for weight, rows in zip(weights, storage.split([weight.shape[0] for weight in weights]), strict=True):
        weight.data = rows


def _composed(x, gate, up, down, *, activation, mask, mask_lora, kept, backend) -> Tensor:
    """For a compiler, which decides what is saved, and fuses what lies between the linears."""
    common = {"mask_lora": mask_lora, "backend": backend}
    *slices, down_slice = kept or (None, None, None)
    g, u = (_linear(x, p, s, out_mask=mask, **common) for p, s in zip((gate, up), slices, strict=True))
    h = ops.ACTIVATIONS[activation][0](g) * u
    return _linear(h, down, down_slice, in_mask=None if mask_lora else mask, **common)


def _fused(x, gate, up, down, *, activation, mask, mask_lora, kept, backend) -> Tensor:
    """One autograd Function of checked and cast operands."""
    x = _cast(x)
    hidden = x.new_empty(()).expand(*x.shape[:-1], gate.weight.shape[0])  # a shape and a dtype for the checks
    linears, out_mask, in_mask = (gate, up, down), None, None
    if kept is not None:
        operands = [
            (None, *kept_slices.prepare(source, slice_, linear.lora_a, linear.lora_b, None)[2:4], None)
            for source, slice_, linear in zip((x, x, hidden), kept, linears, strict=True)
        ]
    else:
        stacked = _stacked((gate, up))
        if stacked is not None:
            linears = (stacked, down)
        out_mask = mask if mask is None or stacked is None else mask.repeat(2)
        sides = [(x, out_mask, None)] * (len(linears) - 1) + [(hidden, None, None if mask_lora else mask)]
        alike = mask_lora or mask is None
        prepared = [
            prepare_linear(
                *(source, p.weight, p.lora_a, p.lora_b, p.bias, None, *masks),
                merge=float(p.scaling) if alike else None,
                backend=backend,
            )
            for p, (source, *masks) in zip(linears, sides, strict=True)
        ]
        operands, (out_mask, in_mask) = [tensors[1:5] for tensors in prepared], (prepared[0][6], prepared[-1][7])
    module = select("masked_lora_swiglu", x.device, x.dtype, backend)[0]
    keep_sum = out_mask is not None and out_mask.requires_grad and torch.is_grad_enabled()
    spec = ops.MlpSpec(activation, tuple(float(p.scaling) for p in linears), mask_lora, keep_sum, kept, module)
    return ops.Swiglu.apply(spec, x, out_mask, in_mask, *(tensor for tensors in operands for tensor in tensors))


def _linear(
    x: Tensor, linear: Projection, kept: KeptSlice | None, *, mask_lora: bool, backend: str, **masks: Tensor | None
) -> Tensor:
    weight, lora_a, lora_b, scaling, bias = linear
    if kept is not None:
        return kept_lora_linear(x, kept, lora_a, lora_b, scaling=scaling, backend=backend)
    options = {"scaling": scaling, "bias": bias, "mask_lora": mask_lora, "backend": backend}
    return masked_lora_linear(x, weight, lora_a, lora_b, **options, **masks)


def _fits(x: Tensor, linear: Projection, mask: Tensor | None) -> bool:
    """Whether a mask covers the outputs of a linear on the device of x: joined masks would hide one that does not."""
    return mask is None or (mask.shape == linear.weight.shape[:1] and mask.device == x.device)


def _is_whole(linear: Projection) -> bool:
    """Whether factors and bias fit their weight: the stack of several could fit although none of them does."""
    weight, lora_a, lora_b, _, bias = linear
    small = (lora_a, lora_b) if bias is None else (lora_a, lora_b, bias)
    return (
        lora_a.ndim == 2
        and lora_a.shape[1:] == weight.shape[1:]
        and lora_b.shape == (weight.shape[0], lora_a.shape[0])
        and (bias is None or bias.shape == weight.shape[:1])
        and all(tensor.device == weight.device for tensor in small)
    )


def _stacked(linears: Sequence[Projection]) -> Projection | None:
    """One projection for several whose frozen weights follow each other in one storage, None for others."""
    first, weights = linears[0], [linear.weight for linear in linears]
    shared = first.weight.untyped_storage().data_ptr(), first.weight.dtype, first.weight.stride(), first.scaling
    start = first.weight.storage_offset()
    for weight, linear in zip(weights, linears, strict=True):
        if (weight.untyped_storage().data_ptr(), weight.dtype, weight.stride(), linear.scaling) != shared:
            return None
        if weight.storage_offset() != start or weight.requires_grad or not weight.is_contiguous():
            return None
        if not _is_whole(linear):
            return None
        start += weight.numel()
    rows, width = sum(weight.shape[0] for weight in weights), first.weight.shape[1]
    weight = first.weight.detach().as_strided((rows, width), (width, 1))
    bias = None
    if any(linear.bias is not None for linear in linears):
        bias = torch.cat(
            [w.new_zeros(len(w)) if p.bias is None else p.bias for p, w in zip(linears, weights, strict=True)]
        )
    lora_a, lora_b = torch.cat([p.lora_a for p in linears]), torch.block_diag(*(p.lora_b for p in linears))
    return Projection(weight, lora_a, lora_b, first.scaling, bias)


def _check_kept(kept: Sequence[KeptSlice] | None, masks: Sequence[Tensor | None], mask_lora: bool) -> None:
    if kept is not None and (mask_lora or any(mask is not None for mask in masks)):
        raise ValueError(
            "kept slices bring their own masks, on the base path: give no mask and no mask_lora with them."
        )


def _cast(x: Tensor) -> Tensor:
    """x as autocast asks, once for all its readers."""
    if torch.is_autocast_enabled(x.device.type) and x.dtype != torch.float64:
        return x.to(torch.get_autocast_dtype(x.device.type))
    return x
