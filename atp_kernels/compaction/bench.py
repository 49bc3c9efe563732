"""Benchmark case of compaction: the gather of a kept weight."""

from functools import partial

import torch

from atp_kernels import compact
from benchmarks.case import Case, Op, Variant, Variants, Work
from benchmarks.linears import by_backend

_TESTS = ("tests/atp_kernels/test_groups.py", "tests/atp_kernels/test_native.py")


def gather(case: Case) -> Variants:
    """Kept rows and columns of one weight; the floor copies a matrix of the kept size."""
    rng = torch.Generator(case.device).manual_seed(0)
    weight = torch.randn(*case.linear, generator=rng, device=case.device).to(case.torch_dtype)
    rows, columns = (
        (torch.rand(size, generator=rng, device=case.device) < case.keep).nonzero().flatten() for size in case.linear
    )

    def ours(backend: str) -> Variant:
        return Variant(partial(compact, weight, rows, columns, backend=backend), holds=(weight,))

    small = torch.randn(rows.numel(), columns.numel(), device=case.device).to(weight.dtype)
    return {
        "unfused": Variant(lambda: weight[rows][:, columns], holds=(weight,)),
        **by_backend("compact", (weight,), ours),
        "floor": Variant(small.clone, same=False, holds=(small,)),
    }


def gather_work(case: Case) -> dict[str, Work]:
    """The kept part is read and written, once each, with its two index vectors."""
    rows, columns = (round(size * case.keep) for size in case.linear)
    return {"forward": Work(0, 2 * rows * columns * case.torch_dtype.itemsize + 8 * (rows + columns))}


OPS = (Op("compact", gather, gather_work, lambda model: model.shapes, _TESTS, ("forward",), ("tokens", "rank")),)
