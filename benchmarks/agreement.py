"""Whether the variants of a case compute the same: a benchmark that compares different functions shows nothing."""

import torch
from torch import Tensor

from benchmarks.case import Case, Op, Variant, ready

# Largest difference as a share of the norm. The operations' own tests hold them to float64; this is about the wiring.
_TOLERANCE = {torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 5e-2}


def disagreements(op: Op, case: Case, wanted: list[str] | None = None) -> list[str]:
    """One sentence for every result or gradient of a variant that differs from the base's."""
    variants, skipped = ready(op, case, [*wanted, op.base] if wanted else None)
    if op.base in skipped:
        return [f"{op.base} does not run: {skipped[op.base]}"]
    same = {name: _results(variant) for name, variant in variants.items() if variant.same}
    expected = same.pop(op.base)
    found = []
    for name, results in same.items():
        for index, (value, other) in enumerate(zip(results, expected, strict=True)):
            error = (value.double() - other.double()).norm() / other.double().norm()
            if not error <= _TOLERANCE[case.torch_dtype]:
                found.append(f"result {index} of {name} differs from {op.base} by {error:.1e} of its norm")
    return found


def _results(variant: Variant) -> list[Tensor]:
    if variant.whole:
        for tensor in variant.inputs:
            tensor.grad = None
        return [variant.forward().detach(), *(tensor.grad for tensor in variant.inputs)]
    result = variant.forward()
    outputs = result if isinstance(result, tuple) else (result,)
    gradients = torch.autograd.grad(result, variant.inputs, variant.grad) if variant.inputs else ()
    return [*(output.detach() for output in outputs), *gradients]
