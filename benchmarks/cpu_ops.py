"""What must hold of the kernels on a CPU, measured side by side in one run.

    python -m benchmarks.cpu_ops

Forward and backward of one linear at 1024 tokens with LLaMA2-7B's shapes, LoRA r 8 and 16, float32 and bfloat16, two
threads; and the group lasso over SmolLM2-135M's 210 LoRA modules, with a group for every row or column and with the
product's own of `kv_group`. Medians of interleaved rounds; a mark of speed is on the median of the ratios in each.
Rows are appended to RESULTS/OP.csv. Exit status 1 if a mark is missed. Takes about twelve minutes on two cores for
float32 alone.
"""

import argparse
import sys
import time
from pathlib import Path

import torch

from benchmarks.case import Case, Op, ready
from benchmarks.gate import Mark, allow, conclude
from benchmarks.measure import peak_bytes
from benchmarks.records import RESULTS, Row, append, environment
from benchmarks.registry import cases, find_ops
from benchmarks.run import MIB, LimitsOf, measure_case, table

ONE_SIDE = {"float32": 1.5, "bfloat16": 1.25}
BOTH_SIDES = {"float32": 2.3}
OVER_ADDMM, LASSO = 0.98, 20.0
MEMORY = 1.001  # not above, but for a scalar here or there
# The output side is cut in gate and up, the input side in o and down; a square linear shows either.
LINEARS = {
    "linear_hard_out": ("q_proj", "gate_proj"),
    "linear_hard_in": ("q_proj", "down_proj"),
    "linear_hard_both": ("q_proj", "gate_proj"),
    "linear_unmasked": ("q_proj", "gate_proj"),
}
# What is timed, the base of the speed-up first, and how many times more rounds than asked. A burst of other work must
# not cover half of them, and a mark within a few per cent of 1 needs a steady middle.
MASKED = (["unfused", "ours", "ours_kept_first"], 2)
TIMED = {"linear_unmasked": (["addmm", "ours"], 5), "group_lasso": (["unfused", "ours", "ours_direct"], 9)}


def linear_marks(rows: list[Row], addmm_mib: float) -> list[Mark]:
    """The marks of one linear case: speed by regime, and peak memory against the `addmm_` idiom's."""
    by_name = {row["variant"]: row for row in rows}
    ours = by_name["ours"]
    op, dtype = ours["op"], ours["dtype"]
    what = f"{op} {ours['part']} r{ours['rank']} {dtype}"
    if op == "linear_unmasked":
        marks = [Mark(f"{what}, times as fast as addmm_", ours["speedup"], OVER_ADDMM)]
    else:
        bounds = BOTH_SIDES if op == "linear_hard_both" else ONE_SIDE
        fast = f"{what}, times as fast as unfused"
        marks = [Mark(fast, ours["speedup"], bounds[dtype])] if dtype in bounds else []
    for name, order in {"ours": "", "ours_kept_first": " kept first"}.items():
        if name in by_name:
            peak = by_name[name]["peak_mib"] / addmm_mib
            marks.append(Mark(f"{what}{order}, peak memory over addmm_'s", peak, MEMORY, at_most=True))
    return marks


def addmm_peak(op: Op, case: Case) -> float:
    """MiB that the `addmm_` idiom allocates at most in forward and backward, without masks."""
    found, _ = ready(op, case, ["addmm"])
    return peak_bytes(found["addmm"], "full", case.device) / MIB


def lasso_marks(rows: list[Row]) -> list[Mark]:
    """The mark of the group lasso, its gradient added to `.grad`, against a loop over modules through autograd."""
    by_name = {row["variant"]: row["speedup"] for row in rows}
    autograd, direct = (by_name[name] for name in ("ours", "ours_direct"))
    what = f"group_lasso {rows[0]['part']} r8 float32, direct (autograd {autograd:.1f}x), times as fast as the loop"
    return [Mark(what, direct, LASSO)]


def parser() -> argparse.ArgumentParser:
    """Options of the script; the defaults are what must hold."""
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--rank", type=int, nargs="+", default=[8, 16])
    options.add_argument("--dtype", nargs="+", default=list(ONE_SIDE))
    options.add_argument("--op", nargs="+", default=[*LINEARS, "group_lasso"], choices=[*LINEARS, "group_lasso"])
    options.add_argument("--part", nargs="+", help="linears; default those whose marks are asked for")
    options.add_argument("--model", default="llama2-7b")
    options.add_argument("--tokens", type=int, default=1024)
    options.add_argument("--rounds", type=int, default=7)
    options.add_argument("--threads", type=int, default=2)
    options.add_argument("--no-verify", action="store_true")
    options.add_argument("--out", type=Path, default=RESULTS)
    return options


def main(arguments: list[str] | None = None) -> int:
    """Measures every case, prints each mark and returns the exit status."""
    asked, started = parser(), time.perf_counter()
    options = asked.parse_args(arguments)
    if min(options.rounds, options.threads, options.tokens, *options.rank) < 1:
        asked.error("--rounds, --threads, --tokens and --rank take whole numbers from 1.")
    torch.set_num_threads(options.threads)
    ops = find_ops(options.op)
    gate = allow(ops, skip=options.no_verify)
    where = environment("cpu") | {"gate": gate}
    limits_of, marks = LimitsOf(), []
    for op in ops:
        lasso = op.name == "group_lasso"
        for case in cases(
            op,
            models=["smollm2-135m" if lasso and options.model == "llama2-7b" else options.model],
            dtypes=["float32"] if lasso else options.dtype,
            ranks=[8] if lasso else options.rank,
            tokens=[options.tokens],
            parts=() if lasso else options.part or LINEARS[op.name],
        ):
            wanted, more_rounds = TIMED.get(op.name, MASKED)
            rows, skipped = measure_case(
                op, case, passes=["full"], rounds=more_rounds * options.rounds, limits=limits_of(case), wanted=wanted,
                base=wanted[0],
            )  # fmt: skip
            append(options.out / f"{op.name}.csv", [where | row for row in rows])
            print(table(case, rows, skipped), flush=True)
            marks += lasso_marks(rows) if lasso else linear_marks(rows, addmm_peak(op, case))
    if not marks:
        asked.error("nothing was measured: no operation has this --part in this --model.")
    print(f"{time.perf_counter() - started:.0f} s, {gate}")
    return conclude(marks)


if __name__ == "__main__":
    sys.exit(main())
