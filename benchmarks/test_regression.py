"""Cases of the registry for pytest-benchmark, so that `--benchmark-autosave` and `--benchmark-compare` find a change.

SmolLM2-135M's shapes at 768 tokens, LoRA r 8, forward and backward; rows of one group are to be compared.
"""

import pytest

from benchmarks.case import ready
from benchmarks.registry import cases, find_ops

OPS = find_ops(["linear_*", "swiglu_*", "qkv_*", "group_prox", "compact"])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("op", OPS, ids=lambda op: op.name)
@pytest.mark.parametrize("variant", ["unfused", "ours"])
def test_op(benchmark, op, dtype, variant):
    """The widest linear of the model, or all of its factors."""
    benchmark.group = f"{op.name} {dtype}"
    chosen = cases(op, models=["smollm2-135m"], dtypes=[dtype], ranks=[8], tokens=[768])
    case = next((case for case in chosen if case.part == "gate_proj"), chosen[0])
    found, skipped = ready(op, case, [variant])
    assert not skipped
    benchmark(found[variant].prepare("full"))
