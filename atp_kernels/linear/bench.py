"""Benchmark cases of the masked LoRA linear: decision step, and no masks."""

from functools import partial

import torch

from atp_kernels import masked_lora_linear
from benchmarks.case import Case, Op, Variant, Variants
from benchmarks.linears import TESTS, by_backend, floor, linear_work, marks, operands


def decision(case: Case) -> Variants:
    """Soft mask with gradient over the sum, factors frozen."""
    tensors, grad, rng = operands(case, train_factors=False)
    x, weight, lora_a, lora_b = tensors
    mask = torch.rand(case.linear[0], generator=rng, device=case.device).requires_grad_()

    def ours(backend: str) -> Variant:
        call = partial(masked_lora_linear, *tensors, scaling=1.0, out_mask=mask, mask_lora=True, backend=backend)
        return Variant(call, (x, mask), grad, holds=(tensors, mask))

    return {
        **marks(case, tensors, (x, mask), grad, {"out_mask": mask, "mask_sum": True}),
        **by_backend("masked_lora_linear", tensors, ours),
        "floor": floor(case, *case.linear),
    }


def unmasked(case: Case) -> Variants:
    """LoRA with no mask, as after the cut."""
    tensors, grad, _ = operands(case, train_factors=True)
    inputs = (tensors[0], *tensors[2:])

    def ours(backend: str) -> Variant:
        return Variant(partial(masked_lora_linear, *tensors, scaling=1.0, backend=backend), inputs, grad, holds=tensors)

    return {
        **marks(case, tensors, inputs, grad, {}),
        **by_backend("masked_lora_linear", tensors, ours),
        "floor": floor(case, *case.linear),
    }


OPS = (
    Op("linear_decision", decision, lambda case: linear_work(case, soft=True), lambda model: model.shapes, TESTS),
    Op("linear_unmasked", unmasked, linear_work, lambda model: model.shapes, TESTS),
)
