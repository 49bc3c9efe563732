"""Benchmark cases of the LoRA linear on a kept slice: hard masks on one side or both."""

from functools import partial
from typing import Any

import torch

from atp_kernels import KeptFirst, KeptSlice, kept_lora_linear, masked_lora_linear
from atp_kernels.call import select
from benchmarks.case import Case, Op, Variant, Variants
from benchmarks.linears import TESTS, floor, kept_sizes, linear_work, marks, operands

_FLOOR_MULTIPLE = 64  # widths that a vendor GEMM likes


def hard(case: Case, sides: tuple[str, ...]) -> Variants:
    """Hard masks on the base path, LoRA on the whole width.

    `ours` takes and returns activations in the order of the model, `ours_kept_first` in the order that a producer and
    its consumer share, so that nothing is gathered; `ours_zeroed` multiplies the whole weight with zeros. `ours_plain`
    is the masked linear, which may make a slice in each call; `ours_dense` names its backend, so that it masks the
    whole product.
    """
    tensors, grad, rng = operands(case, train_factors=True)
    x, weight, lora_a, lora_b = tensors
    sizes = dict(zip(("out_mask", "in_mask"), case.linear, strict=True))
    draw = partial(torch.rand, generator=rng, device=case.device)
    masks: dict[str, Any] = {name: draw(sizes[name]) < case.keep for name in sides}
    inputs = (x, lora_a, lora_b)
    kept = KeptSlice(weight, **masks)
    sliced = partial(kept_lora_linear, x, kept, lora_a, lora_b, scaling=1.0)
    orders: dict[str, Any] = {name: KeptFirst(mask) for name, mask in masks.items()}
    first = KeptSlice(weight, **orders)
    permuted = partial(kept_lora_linear, x, first, lora_a, lora_b, scaling=1.0)
    masked = partial(masked_lora_linear, *tensors, scaling=1.0)
    dense = select("masked_lora_linear", x.device, x.dtype).name
    padded = (-(-count // _FLOOR_MULTIPLE) * _FLOOR_MULTIPLE for count in kept_sizes(case, sides))
    widths = map(min, case.linear, padded)
    return {
        **marks(case, tensors, inputs, grad, masks),
        "ours": Variant(sliced, inputs, grad, holds=(tensors, kept)),
        "ours_zeroed": Variant(
            partial(kept_lora_linear, x, kept.zeroed, lora_a, lora_b, scaling=1.0), inputs, grad, holds=(tensors, kept)
        ),
        "ours_kept_first": Variant(permuted, inputs, grad, same=False, holds=(tensors, first)),
        "ours_plain": Variant(partial(masked, **masks), inputs, grad, holds=tensors),
        "ours_dense": Variant(partial(masked, **masks, backend=dense), inputs, grad, holds=tensors),
        "floor": floor(case, *widths),
    }


def _op(name: str, *sides: str) -> Op:
    return Op(
        f"linear_hard_{name}",
        build=lambda case: hard(case, sides),
        work=lambda case: linear_work(case, sides),
        parts=lambda model: model.shapes,
        tests=TESTS,
    )


OPS = (_op("out", "out_mask"), _op("in", "in_mask"), _op("both", "out_mask", "in_mask"))
