"""Call the native operations with operands that fit, and with operands of which one does not.

    python tests/fuzz_native.py --calls 20000     cases 0 to 19,999, in whatever extension is built
    python tests/fuzz_native.py --case 17         one of them, with its traceback
    python tests/fuzz_native.py --threads 2       the cases shared by threads of Python

A case is a function of its number alone. Operands that fit must be accepted; with one broken operand a call may be
accepted too, or refuse with an exception. What else can go wrong in C++, a sanitizer reports (`sanitize.py`): the
number of the case under way is in `fuzz_native.case` then. The values of a GroupPlan stay as they are: operations trust
them, since the plan has checked them. Exit status 1 when a call that fits is refused.
"""

import argparse
import os
import random
import sys
import threading
import traceback
from collections import Counter
from pathlib import Path

import torch

from atp_kernels import extension
from atp_kernels.groups.plan import GroupPlan

LAST = Path("fuzz_native.case")
SIZES = (0, 1, 2, 3, 5, 7, 8, 9, 15, 16, 17, 31, 33, 63, 64, 65, 100, 130)
DTYPES = (torch.float32, torch.bfloat16)
ODD_DTYPES = (torch.float64, torch.float16, torch.int64, torch.int32, torch.int8, torch.bool, torch.complex64)
ODD_INTS = (-1, 0, 1, -(2**40), 2**50, 2**62, 2**63 - 1, -(2**63))
ODD_FLOATS = (0.0, -1.0, 1e-45, 1e38, float("inf"), float("nan"))
REFUSALS = (RuntimeError, ValueError, TypeError, IndexError, MemoryError)


class Operands:
    """Random operands that fit."""

    def __init__(self, draw: random.Random) -> None:
        self.draw, self.generator = draw, torch.Generator().manual_seed(draw.randrange(2**31))
        self.dtype = draw.choice(DTYPES)

    def size(self, least: int = 0) -> int:
        return max(least, self.draw.choice(SIZES))

    def matrix(self, rows: int, cols: int, dtype: torch.dtype | None = None) -> torch.Tensor:
        values = torch.randn(rows, cols, generator=self.generator)
        if values.numel() and self.draw.random() < 0.1:
            values.view(-1)[self.draw.randrange(values.numel())] = self.draw.choice(ODD_FLOATS)
        return values.to(dtype or self.dtype)

    def apart(self, rows: int, cols: int) -> torch.Tensor:
        """A matrix whose rows may lie apart."""
        wide = self.matrix(rows, cols + self.draw.choice((0, 0, 1, 5)))
        return wide[:, wide.shape[1] - cols :]

    def vector(self, size: int) -> torch.Tensor:
        return torch.rand(size, generator=self.generator)

    def flags(self, size: int) -> torch.Tensor:
        return self.vector(size) < 0.5

    def mask(self, size: int) -> torch.Tensor:
        return self.draw.choice((self.flags, self.vector))(size)

    def indices(self, count: int, below: int) -> torch.Tensor:
        return torch.randint(max(below, 1), (count if below else 0,), generator=self.generator)


def columns(o: Operands, name: str) -> list:
    rows, cols = o.size(), o.size()
    one, other = o.matrix(rows, cols), o.matrix(rows, cols)
    return {"column_dot": [one, other], "mask_and_dot": [one, other, o.mask(cols)]}.get(name, [one, o.mask(cols)])


def dropped(o: Operands, name: str) -> list:
    return [o.matrix(o.size(), o.size()), o.draw.randrange(2**32), 2.0, o.draw.randrange(-(2**63), 2**63)]


def take_columns(o: Operands, name: str) -> list:
    rows, cols = o.size(), o.size()
    index = o.indices(o.size(), cols)
    return [o.apart(rows, cols), index, o.apart(rows, len(index))]


def spread_columns(o: Operands, name: str) -> list:
    rows, cols = o.size(), o.size(1)
    width = o.draw.randint(1, cols)
    return [o.apart(rows, cols), width, o.indices(cols, width)]


def swiglu(o: Operands, name: str) -> list:
    samples, cols = o.draw.randint(1, 3), o.size()
    rows = samples * o.size()
    matrices = [o.apart(rows, cols) for _ in range(2 if name == "swiglu_forward" else 5)]
    sums = [o.draw.choice((None, o.vector(samples * cols).view(samples, cols)))]
    gelu = o.draw.random() < 0.5
    return [*matrices, gelu] if name == "swiglu_forward" else [*matrices, *sums, gelu]


def sample_dots(o: Operands, name: str) -> list:
    samples, cols = o.draw.randint(1, 3), o.size()
    rows = samples * o.size()
    return [o.matrix(rows, cols), o.matrix(rows, cols), o.vector(samples * cols).view(samples, cols)]


def pack(o: Operands, cols: int, outputs: list[int], bias: bool) -> tuple[list, list, int]:
    """(weight, down and perhaps bias, factors, ranks) of linears of one input."""
    ranks = [o.size() for _ in outputs]
    factors = [o.matrix(*s, torch.float32) for n, r in zip(outputs, ranks, strict=True) for s in ((r, cols), (n, r))]
    rows, rank = sum(outputs), sum(ranks)
    parts = [o.matrix(rows, cols + rank, torch.bfloat16), o.matrix(rank, cols, torch.bfloat16)]
    if bias:
        parts.append(o.draw.choice((None, o.matrix(1, rows, torch.bfloat16)[0])))
    return parts, factors, rank


def packed(o: Operands, name: str) -> list:
    rows, cols, outputs = o.size(), o.size(), [o.size() for _ in range(o.draw.randint(1, 3))]
    forward = name.endswith("forward")
    parts, factors, rank = pack(o, cols, outputs, bias=forward)
    if forward:
        return [o.matrix(rows, cols, torch.bfloat16), *parts, factors, 0.5]
    read = [o.matrix(rows, n, torch.bfloat16) for n in (sum(outputs), cols + rank)]
    return [*read, *parts, factors, 0.5, o.draw.random() < 0.5]


def packed_blocks(o: Operands, name: str) -> list:
    """Operands of a gated MLP or of an attention, whose second pack is one linear."""
    attention, forward = "attention" in name, name.endswith("forward")
    samples, tokens, cols, ends = o.draw.randint(1, 3), o.size(), o.size(), o.size()
    normed = o.draw.random() < 0.5
    ends = cols if normed else ends
    rows, groups, dim = samples * tokens, o.draw.randint(1, 2), 2 * o.draw.randint(1, 9)
    inner = groups * o.draw.randint(1, 3) * dim if attention else o.size()
    outputs = [inner, groups * dim, groups * dim] if attention else [inner, inner]
    first, factors, rank = pack(o, cols, outputs, bias=forward)
    last, more, end = pack(o, inner, [ends], bias=forward)
    given = [*first, *last, factors + more, 0.5, 0.5, *([] if attention else [o.draw.random() < 0.5])]
    turned = o.draw.choice((tokens, rows))
    angles = [o.matrix(turned, dim, torch.float32) for _ in range(2)]
    seen = o.draw.choice((None, o.flags(tokens * tokens).view(1, tokens, tokens)))
    if forward:
        attends = [*angles, seen, 0.5, samples] if attention else []
        norm = [o.vector(cols), 1e-6] if normed else [None, 0.0]
        return [o.matrix(rows, cols, torch.float32 if normed else torch.bfloat16), *given, *attends, *norm]
    sizes = [ends, cols + rank, sum(outputs), inner + end if attention else end]
    read = [o.matrix(rows, n, torch.bfloat16) for n in sizes]
    if attention:
        heads = inner // dim
        p = o.matrix(samples * heads * tokens, tokens, torch.bfloat16).view(
            samples * groups, heads // groups * tokens, tokens
        )
        read.insert(3, p)
        given += [*angles, 0.5, samples]
    sums = o.draw.choice((None, o.vector(samples * sum(outputs)).view(samples, sum(outputs))))
    if not attention and sums is not None:
        sums = o.vector(samples * inner).view(samples, inner)
    around = [None] * 3
    if normed:
        read[0] = o.matrix(rows, ends, torch.float32)
        around = [o.matrix(rows, cols, torch.float32), o.vector(cols), o.vector(rows)]
    return [*read, *given, o.draw.random() < 0.5, sums, *around]


def cross_entropy(o: Operands, name: str) -> list:
    rows, cols = o.size(), o.size(1)
    return [o.matrix(rows, cols), o.indices(rows, cols)]


def rms_norm(o: Operands, name: str) -> list:
    rows, cols = o.size(), o.size(1)
    x, weight = o.matrix(rows, cols), o.vector(cols)
    if name == "rms_norm_forward":
        return [x, weight, 1e-6, o.draw.random() < 0.5]
    return [o.matrix(rows, cols, o.draw.choice(DTYPES)), x, weight, o.vector(rows)]


def merged_weight(o: Operands, name: str) -> list:
    rows, cols, rank = o.size(), o.size(), o.size()
    shapes = ((rows, cols), (rank, cols), (rows, rank))
    return [*(o.matrix(*shape, torch.float32) for shape in shapes), 0.5]


def compact(o: Operands, name: str) -> list:
    rows, cols = o.size(), o.size()
    weight = o.matrix(rows, cols)
    kept = [o.draw.choice((None, o.indices(o.size(), size))) for size in (rows, cols)]
    return [weight, *kept, o.draw.choice((1, 2, 8, 64))]


def groups(o: Operands, name: str) -> list:
    """Operands of the group operations: slots in runs, shuffled, or each a group of its own."""
    kind = o.draw.choice(("runs", "shuffled", "separate"))
    shapes = [(o.size(1), o.size(1)) for _ in range(o.draw.randint(1, 3))]
    axes = [o.draw.randint(0, 1) for _ in shapes]
    ids, n_groups = [], 0
    for shape, axis in zip(shapes, axes, strict=True):
        length = 1 if kind == "separate" else o.draw.randint(1, 4)
        ids.append(n_groups + torch.arange(shape[axis]) // length)
        n_groups = int(ids[-1][-1]) + 1
    if kind == "shuffled":
        order = torch.randperm(n_groups, generator=o.generator)
        ids = [order[index][torch.randperm(len(index), generator=o.generator)] for index in ids]
    mixed = name.startswith("group") and o.draw.random() < 0.3
    factors = [o.matrix(*shape, o.draw.choice(DTYPES) if mixed else None) for shape in shapes]
    plan = GroupPlan.of(factors, list(zip(axes, ids, strict=True)), n_groups)
    packed = [Fixed(tensor) for tensor in (plan._index, plan._order, plan._starts)]
    removed, sides = o.flags(n_groups), [side for shape in shapes for side in shape]
    one = torch.ones(())
    if name == "group_lasso_forward":
        return [factors, axes, *packed, removed, 1e-8]
    if name == "group_lasso_backward":
        return [factors, axes, packed[0], removed, o.vector(n_groups), one]
    if name == "group_lasso_grad_":
        grads = [torch.zeros_like(factor) for factor in factors]
        return [factors, grads, axes, *packed, sides, removed, one, 1e-8, Fixed(plan.runs)]
    if name == "group_prox_":
        return [factors, axes, *packed, removed, o.vector(n_groups)]
    removed = o.flags(sum(shape[axis] for shape, axis in zip(shapes, axes, strict=True)))
    if name == "separate_lasso_forward":
        return [factors, axes, removed, 1e-8, o.draw.random() < 0.5]
    size = sum((rows * cols + 63) // 64 * 64 for rows, cols in shapes)
    return [o.matrix(1, size)[0], sides, one, o.draw.random() < 0.5]


class Fixed:
    """An operand whose value is not broken: an operation trusts it."""

    def __init__(self, value) -> None:
        self.value = value


CASES = {
    "add_sample_dots": sample_dots, "packed_forward": packed, "packed_backward": packed,
    "packed_mlp_forward": packed_blocks, "packed_mlp_backward": packed_blocks,
    "packed_attention_forward": packed_blocks, "packed_attention_backward": packed_blocks,
    "masked": columns, "mask_": columns, "column_dot": columns, "mask_and_dot": columns, "dropped": dropped,
    "take_columns": take_columns, "spread_columns_": spread_columns, "swiglu_forward": swiglu,
    "swiglu_backward": swiglu, "cross_entropy_": cross_entropy, "rms_norm_forward": rms_norm,
    "rms_norm_backward": rms_norm, "merged_weight": merged_weight, "compact": compact, "group_lasso_forward": groups,
    "group_lasso_backward": groups, "group_lasso_grad_": groups, "group_prox_": groups,
    "separate_lasso_forward": groups, "separate_lasso_backward": groups,
}  # fmt: skip


def broken(value, draw: random.Random):
    """Another value in place of an operand, mostly one that does not fit."""
    if isinstance(value, torch.Tensor):
        return broken_tensor(value, draw)
    if isinstance(value, list):
        place = draw.randrange(len(value))
        kind = draw.randrange(3)
        changed = [broken(value[place], draw)] if kind == 0 else [] if kind == 1 else [value[place]] * 2
        return value[:place] + changed + value[place + 1 :]
    if isinstance(value, bool):
        return not value
    if isinstance(value, float):
        return draw.choice(ODD_FLOATS)
    return draw.choice(ODD_INTS) if isinstance(value, int) else torch.arange(draw.choice(SIZES))


def broken_tensor(value: torch.Tensor, draw: random.Random) -> torch.Tensor:
    ways = ["dtype", "longer", "shorter", "flat", "deep", "empty", "step", "turned", "repeated"]
    if value.dtype == torch.int64 and value.numel():
        ways += ["entry"] * 5
    way = draw.choice(ways)
    if way == "entry":
        value = value.clone()
        value.view(-1)[draw.randrange(value.numel())] = draw.choice((-1, 200, 2**31, 2**32, 2**40, -(2**62), 2**63 - 1))
        return value
    if way == "dtype":
        return value.to(draw.choice(ODD_DTYPES))
    if way == "flat":
        return value.reshape(-1)
    if way == "deep":
        return value.unsqueeze(draw.randint(0, value.dim()))
    if way == "turned" and value.dim() == 2:
        return value.t()
    if value.dim() == 0:
        return value.new_zeros(draw.choice((0, 2)))
    axis = draw.randrange(value.dim())
    size = value.shape[axis]
    if way == "longer":
        return torch.cat([value, value.narrow(axis, 0, min(size, 1))], axis)
    if way == "shorter" and size:
        return value.narrow(axis, 0, size - 1).clone()
    if way == "repeated":
        return value.narrow(axis, 0, min(size, 1)).expand(*value.shape) if size else value
    if way == "step":
        return torch.repeat_interleave(value, 2, axis)[(slice(None),) * axis + (slice(None, None, 2),)]
    return value.narrow(axis, 0, 0)


def run_case(number: int) -> str:
    """`name: accepted` or `name: refused`. Raises AssertionError when operands that fit are refused."""
    draw = random.Random(number)
    name = draw.choice(sorted(CASES))
    arguments = CASES[name](Operands(draw), name)
    fits = draw.random() < 0.4
    if not fits:
        places = [place for place, value in enumerate(arguments) if not isinstance(value, Fixed)]
        place = draw.choice(places)
        arguments[place] = broken(arguments[place], draw)
    given = [value.value if isinstance(value, Fixed) else value for value in arguments]
    try:
        getattr(extension.ops, name)(*given)
        return f"{name}: accepted"
    except REFUSALS as error:
        if fits:
            raise AssertionError(f"case {number}: {name} refuses operands that fit: {error}") from error
        return f"{name}: refused"


def run_cases(numbers: range, place: int, counts: Counter) -> None:
    """Runs cases and counts how they end; writes the number of each, in 10 characters, before it runs."""
    record = os.open(LAST, os.O_WRONLY | os.O_CREAT)
    for number in numbers:
        os.pwrite(record, f"{number:9}\n".encode(), 10 * place)
        try:
            counts[run_case(number)] += 1
        except Exception:
            counts["FAILED"] += 1
            print(traceback.format_exc(), flush=True)
    os.close(record)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--calls", type=int, default=20_000)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--case", type=int)
    options = parser.parse_args()
    if not extension.AVAILABLE:
        sys.exit(f"nothing to call: {extension.REASON}")
    if options.case is not None:
        print(run_case(options.case))
        return
    counts = [Counter() for _ in range(options.threads)]
    shares = [range(place, options.calls, options.threads) for place in range(options.threads)]
    workers = [
        threading.Thread(target=run_cases, args=(share, place, counts[place])) for place, share in enumerate(shares)
    ]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    LAST.unlink(missing_ok=True)
    total = sum(counts, Counter())
    accepted, refused = (sum(n for name, n in total.items() if name.endswith(how)) for how in ("accepted", "refused"))
    unmet = [name for name in CASES if not {f"{name}: accepted", f"{name}: refused"} <= total.keys()]
    print(f"never both accepted and refused: {', '.join(unmet)}" if unmet else f"all {len(CASES)} operations met")
    isa = extension.build_info()["isa"]
    print(f"{total.total()} calls with {isa}: {accepted} accepted, {refused} refused, {total['FAILED']} failed")
    sys.exit(total["FAILED"] > 0)


if __name__ == "__main__":
    main()
