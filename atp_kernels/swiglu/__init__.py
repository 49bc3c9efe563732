"""The gated MLP of a decoder layer over masked LoRA linears, as one operation that saves less than its parts."""

import torch
from torch import Tensor

from atp_kernels.checks import check_dropout
from atp_kernels.kept.slices import KeptSlice
from atp_kernels.kinds import typed
from atp_kernels.mask_gradient import check_sums, mask_gradient
from atp_kernels.projection import Projection, check_kept, project
from atp_kernels.swiglu import op
from atp_kernels.swiglu.aten import ACTIVATIONS


@typed
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
    dropout: float = 0.0,
    seeds: tuple[int | Tensor, int | Tensor] | None = None,
    mask_grad: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """down(act(gate(x)) * up(x)), each a masked LoRA linear, with the product recomputed in backward.

    x [..., hidden]; gate and up: weight [channels, hidden], down: weight [hidden', channels], factors and dtypes as in
    `masked_lora_linear`. activation: "silu" or "gelu_tanh". mask [channels], bool or floating: with `mask_lora` on the
    sums of gate and up (decision step), without it on the base paths of all three, at the input of down (LoRA step).
    kept: the slices of gate, up and down instead of a mask, sharing one `KeptFirst` or one bool mask; their weights and
    biases are those that count. dropout: of what the adapters read, as in `masked_lora_linear`, once for gate and up by
    the first of the `seeds` and for down by the second, over the channels as they lie; PEFT draws for each linear, and
    each of them sees the same distribution here. mask_grad [samples, channels], float32: backward adds the gradient
    that a mask of ones on the sums of gate and up would have in each sample, as `mask_gradient` does; x is [samples,
    ..., hidden] then. It goes with no mask, or with a bool one and `mask_lora`; what that removes is not defined.
    Returns [..., hidden'] in the dtype of x. Differentiable once in every floating input that requires it. Errors as in
    `masked_lora_linear` and `kept_lora_linear`.
    Source: arXiv 2412.14426, section 3; Shazeer 2020, "GLU variants improve transformer".

    >>> gate, up = (Projection(torch.ones(4, 3), torch.ones(1, 3), torch.ones(4, 1), 0.5) for _ in range(2))
    >>> down = Projection(torch.ones(3, 4), torch.ones(1, 4), torch.ones(3, 1), 0.5)
    >>> masked_lora_swiglu(torch.ones(2, 3), gate, up, down, mask=torch.tensor([True, True, False, False])).shape
    torch.Size([2, 3])
    """
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation is {activation!r}: use one of {', '.join(ACTIVATIONS)}.")
    if gate.weight.shape != up.weight.shape:
        raise ValueError(f"gate {list(gate.weight.shape)} and up {list(up.weight.shape)} need weights of one shape.")
    check_kept(kept, (mask,), mask_lora)
    if kept is not None and not (kept[0].out_mask is kept[1].out_mask is kept[2].in_mask):
        raise ValueError("the slices of gate and up and the input of down must share one mask or KeptFirst object.")
    drawn = seeds or (None, None)
    if len(drawn) != 2:
        raise ValueError(f"seeds has {len(drawn)} of two: give that of gate and up, and that of down.")
    if dropout != 0:
        for seed in drawn:
            check_dropout(x, dropout, seed, None)
    if mask_grad is not None:
        _check_mask_grad(mask_grad, x, gate.weight, kept, mask, mask_lora)
    call = _composed if torch.compiler.is_compiling() else op.swiglu
    return call(x, (gate, up, down), kept, activation, mask, mask_lora, float(dropout), drawn, backend, mask_grad)


def _check_mask_grad(
    sums: Tensor, x: Tensor, weight: Tensor, kept: tuple[KeptSlice, ...] | None, mask: Tensor | None, mask_lora: bool
) -> None:
    if x.ndim < 2 or sums.shape != (len(x), len(weight)):
        raise ValueError(f"mask_grad has shape {list(sums.shape)}: give [samples, channels] for x [samples, ..., K].")
    if kept is not None or (mask is not None and (mask.is_floating_point() or not mask_lora)):
        raise ValueError("mask_grad must be alone, or beside a bool mask with mask_lora=True.")
    check_sums(sums, x, "mask_grad")


def _composed(x, linears, kept, activation, mask, mask_lora, dropout, seeds, backend, mask_grad) -> Tensor:
    """For a compiler, which decides what is saved, and fuses what lies between the linears."""
    gate, up, down = zip(linears, kept or (None, None, None), strict=True)
    common = {"mask_lora": mask_lora, "dropout": dropout, "backend": backend}
    g, u = (project(x, *producer, out_mask=mask, seed=seeds[0], **common) for producer in (gate, up))
    if mask_grad is not None:
        g, u = (mask_gradient(values, mask_grad, backend="reference") for values in (g, u))
    h = ACTIVATIONS[activation][0](g) * u
    return project(h, *down, in_mask=None if mask_lora else mask, seed=seeds[1], **common)
