"""Every operation that can be benchmarked, and which cases a choice of options stands for."""

import importlib
from collections.abc import Iterable
from dataclasses import replace
from fnmatch import fnmatch
from itertools import product
from pathlib import Path

import atp_kernels
from benchmarks.case import Case, Op
from benchmarks.ops.training import TRAINING
from benchmarks.shapes import find_model

_ROOMS = sorted(path.parent.name for path in Path(atp_kernels.__path__[0]).glob("*/bench.py"))
_IN_ROOMS = [op for room in _ROOMS for op in importlib.import_module(f"atp_kernels.{room}.bench").OPS]
OPS: tuple[Op, ...] = (*_IN_ROOMS, *TRAINING)


def find_ops(patterns: Iterable[str]) -> list[Op]:
    """The operations whose name matches a pattern such as `linear_*`. Raises ValueError for one that matches none."""
    patterns = list(patterns)
    for pattern in patterns:
        if not any(fnmatch(op.name, pattern) for op in OPS):
            raise ValueError(f"no operation matches {pattern!r}: use one of {', '.join(op.name for op in OPS)}.")
    return [op for op in OPS if any(fnmatch(op.name, pattern) for pattern in patterns)]


def cases(
    op: Op,
    *,
    models: Iterable[str],
    dtypes: Iterable[str],
    ranks: Iterable[int],
    tokens: Iterable[int],
    parts: Iterable[str] = (),
    **same: str | int | float | bool,
) -> list[Case]:
    """All cases of an operation; `parts` names some of a model's, `same` are fields of `Case` that all share.

    Numbers that change nothing for the operation are 0 and give one case. Raises ValueError for an unknown model.
    """
    chosen = set(parts)
    found = [
        Case(op.name, name, part, count, rank, dtype, **same)
        for name, dtype, rank, count in product((find_model(m).name for m in models), dtypes, ranks, tokens)
        for part in op.parts(find_model(name))
        if not chosen or part in chosen
    ]
    ignored = {name: 0 for name in op.ignores}
    return list(dict.fromkeys(replace(case, **ignored) for case in found))
