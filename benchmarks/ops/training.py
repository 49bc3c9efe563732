"""Whole training steps by phase as operations; what they do is in `benchmarks.steps`."""

from collections.abc import Callable
from functools import partial

from benchmarks.case import Case, Op, Variants, Work

_TESTS = ("tests/atp/lora", "tests/atp/decide", "tests/atp/removal")


def step_work(case: Case, *, keep: float | None = None) -> dict[str, Work]:
    """Products of the linears and the head, forward and backward to activations; weights are read once each way.

    Attention, norms, LoRA and the optimizer are left out, as in the limit that a cut of parameters sets.
    """
    sizes = case.sizes
    weights = (case.keep if keep is None else keep) * sizes.linear_params + sizes.hidden * sizes.vocab
    item = 4 if case.device == "cpu" else case.torch_dtype.itemsize
    once = Work(2 * case.tokens * weights, item * weights)
    return {"forward": once, "backward": once}


def _open(case: Case) -> Variants:
    from benchmarks.steps import before

    return before(case)


def _decision(case: Case) -> Variants:
    from benchmarks.steps import decision  # the kernels' benchmarks need neither transformers nor peft

    return decision(case)


def _search(case: Case) -> Variants:
    from benchmarks.steps import search

    return search(case)


def _tune(case: Case) -> Variants:
    from benchmarks.steps import tune

    return tune(case)


def _op(name: str, build: Callable, work: Callable, base: str = "unfused") -> Op:
    return Op(name, build, work, lambda model: ("kv_group", "head_dim"), _TESTS, passes=("full",), base=base)


TRAINING = (
    _op("train_open", _open, partial(step_work, keep=1.0), base="stock"),
    _op("train_decision", _decision, partial(step_work, keep=1.0)),
    _op("train_search", _search, step_work),
    _op("train_tune", _tune, step_work, base="stock"),
)
