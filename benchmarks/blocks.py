"""What benchmarks of several linears share: their operands and their work."""

from dataclasses import replace
from functools import reduce
from operator import add

import torch
from torch import Tensor

from atp_kernels import Projection
from benchmarks.case import Case, Work
from benchmarks.linears import linear_work

TESTS = ("tests/atp_kernels/test_blocks.py", "tests/atp_kernels/test_passes.py")


def projections(case: Case, names: tuple[str, ...], *, train_factors: bool) -> tuple[Tensor, list[Projection]]:
    """Random x [tokens, hidden] and linears with their factors."""
    rng = torch.Generator(case.device).manual_seed(0)
    draw = lambda *size: torch.randn(size, generator=rng, device=case.device).to(case.torch_dtype)  # noqa: E731
    linears = []
    for n_out, n_in in map(case.sizes.linears.__getitem__, names):
        weight, lora_a = (draw(rows, n_in).div_(n_in**0.5) for rows in (n_out, case.rank))
        factors = lora_a.requires_grad_(train_factors), draw(n_out, case.rank).requires_grad_(train_factors)
        linears.append(Projection(weight, *factors, 1.0))
    return draw(case.tokens, case.sizes.hidden).requires_grad_(), linears


def block_work(case: Case, names: tuple[str, ...], *, regime: str = "unmasked") -> dict[str, Work]:
    """The sum of the linears' work; what lies between them is left out, and x counts once for each reader."""
    sides = {name: ("in_mask",) if name == "down_proj" else ("out_mask",) for name in names}
    works = [
        linear_work(replace(case, part=name), sides[name] if regime == "hard" else (), soft=regime == "decision")
        for name in names
    ]
    return {pass_: reduce(add, (work[pass_] for work in works)) for pass_ in ("forward", "backward")}
