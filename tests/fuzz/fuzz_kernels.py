"""Call the public operations of atp_kernels with operands at random, and hold them to their definitions in float64.

    python tests/fuzz/fuzz_kernels.py --calls 50000       cases 0 to 49,999
    python tests/fuzz/fuzz_kernels.py --case 17           one of them, with its traceback
    python tests/fuzz/fuzz_kernels.py --backend triton    in one backend; Triton on a CPU needs TRITON_INTERPRET=1

A case is a function of its number, on a torch build. Shapes (0, 1, odd, large), dtypes, strides, masks, dropout and
which operands want a gradient are drawn. Two of three calls get operands that fit: results and gradients must be those
of the definition up to rounding, measured by the same sums over absolute values. The others get one operand that may
not fit, and may refuse it in one sentence. Exit status 1 for anything else.
"""

import argparse
import random
import sys
import traceback
import warnings
from collections import Counter
from pathlib import Path

import torch

import atp_kernels  # before tests/atp_kernels is on the path

sys.path.insert(0, str(Path(__file__).parents[1]))
from fuzz_native import broken
from kernel_calls import Draw
from kernel_cases import CALLS

from atp_kernels.call import OPERATIONS
from atp_kernels.quantized.weight import dense

SENTENCES = (ValueError, TypeError, RuntimeError)
# Of one rounding of a sum over absolute values. A result of 16 bits has been rounded a few times on its way.
ALLOWED = {torch.float64: 512, torch.float32: 256, torch.bfloat16: 8, torch.float16: 8}


def run_case(number: int, backend: str | None = None) -> str:
    """`name: equal`, `name: accepted` or `name: refused`. Raises AssertionError for anything else."""
    draw = random.Random(number)
    name = draw.choice(sorted(CALLS))
    call = CALLS[name](Draw(draw, backend))
    operation = OPERATIONS.get(name)
    if operation is not None and call.given["backend"] not in ("auto", *operation.backends):
        call.given["backend"] = "auto"
    if draw.random() < 1 / 3:
        place = draw.choice(sorted(call.given))
        call.given[place] = odd(call.given[place], draw)
        try:
            call.run()
        except SENTENCES as error:
            said = str(error)
            assert is_sentence(said), f"case {number}: {name} with an odd {place}: {type(error).__name__}: {said}"
            return f"{name}: refused"
        return f"{name}: accepted"
    try:
        got = call.run()
    except SENTENCES as error:
        raise AssertionError(f"case {number}: {name} refuses operands that fit: {error}") from error
    expected, sizes = call.defined()
    assert got.keys() == expected.keys(), f"case {number}: {name} gives {sorted(got)} for {sorted(expected)}"
    for part, value in got.items():
        check(f"case {number}: {name}, {part}", value, expected[part], sizes[part], call.coarsest(value))
    return f"{name}: equal"


def odd(value, draw: random.Random):
    """Another value in place of an operand, mostly one that does not fit."""
    if draw.random() < 0.2:
        return draw.choice((None, [True, False], "abc", -1, 1.5, torch.ones(3), object()))
    if isinstance(value, torch.Tensor):
        return broken(dense(value).detach(), draw)
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        place = draw.randrange(len(value))
        return value._replace(**{value._fields[place]: odd(value[place], draw)})
    if isinstance(value, (list, tuple)) and value:
        place = draw.randrange(len(value))
        return type(value)([*value[:place], odd(value[place], draw), *value[place + 1 :]])
    return broken(value, draw) if isinstance(value, (bool, int, float)) else torch.arange(draw.choice((0, 1, 7)))


def is_sentence(said: str) -> bool:
    """Whether a refusal is ours: one line that ends as a sentence, and is none of torch's."""
    ours = ("\n", "aten::", "Expected ", "expected ", "must match the size", "not implemented for", "Overflow")
    return said.endswith(".") and len(said) < 400 and not any(mark in said for mark in ours)


def check(where: str, got: torch.Tensor, expected: torch.Tensor, size: torch.Tensor, dtype: torch.dtype) -> None:
    """Holds a result to the definition's; size: the same sums over absolute values."""
    assert got.shape == expected.shape, f"{where} has shape {list(got.shape)}, not {list(expected.shape)}"
    if got.numel() == 0:
        return
    info = torch.finfo(dtype)
    bound = (ALLOWED[dtype] * (info.eps * size + info.tiny)).expand(expected.shape)
    held = expected.abs() + bound < torch.finfo(got.dtype).max  # more than that overflows in a definition as well
    assert got[held].isfinite().all(), f"{where} is not finite"
    off = torch.where(held, (got.double() - expected).abs() - bound, -1.0)
    worst = off.argmax()
    assert off.max() <= 0, f"{where}: {float(off.max()):.2e} beyond {float(bound.flatten()[worst]):.2e} at {int(worst)}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--calls", type=int, default=5_000)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--backend", choices=[name for name in atp_kernels.available_backends() if name != "auto"])
    parser.add_argument("--case", type=int)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    if options.case is not None:
        print(run_case(options.case, options.backend))
        return
    counts: Counter = Counter()
    for number in range(options.first, options.first + options.calls):
        try:
            counts[run_case(number, options.backend)] += 1
        except Exception as error:
            counts["FAILED"] += 1
            text = str(error) if isinstance(error, AssertionError) else f"case {number}: {traceback.format_exc()}"
            print(text, flush=True)
    for name in sorted(CALLS):
        print(f"{name}: " + ", ".join(f"{counts[f'{name}: {how}']} {how}" for how in ("equal", "accepted", "refused")))
    print(f"cases {options.first} to {options.first + options.calls - 1}: {counts['FAILED']} failed")
    sys.exit(counts["FAILED"] > 0)


if __name__ == "__main__":
    main()
