"""Whole training steps by phase, with what must hold for them.

    python -m benchmarks.training --model smollm2-135m --batch 4 --length 256
    python -m benchmarks.training --op train_open train_tune --batch 4 --length 26    # four headlines, a short step
    python -m benchmarks.training --model 7b --batch 2 --length 1024 --checkpointing --dtype bfloat16

Every step is measured in each dtype, and the better of them stands for each side. Rows are appended to
RESULTS/train_*.csv. Exit status 1 if a mark is missed, unless --lenient.
"""

import argparse
import sys
from pathlib import Path

import torch

from atp.training.cross_entropy import held_heads
from benchmarks.case import Case, Op
from benchmarks.gate import Mark, allow, conclude
from benchmarks.ops.training import step_work
from benchmarks.records import RESULTS, Row, append, environment
from benchmarks.registry import cases, find_ops
from benchmarks.run import LimitsOf, measure_case

KEEPS = {"train_open": (0.6,), "train_decision": (0.6,), "train_search": (0.6,), "train_tune": (0.6, 0.4)}


def best(rows: list[Row], op: str, variant: str, keep: float) -> float:
    """The shortest p50 of a step over all dtypes, in ms."""
    wanted = {"op": op, "variant": variant, "keep": keep}
    return min(float(row["p50_ms"]) for row in rows if wanted.items() <= row.items())


def flop_limit(row: Row) -> float:
    """How many times fewer FLOPs the kept share of linears takes than the dense model, head included in both."""
    case = Case(row["op"], row["model"], row["part"], row["tokens"], row["rank"], row["dtype"], keep=row["keep"])
    return step_work(case, keep=1.0)["forward"].flops / step_work(case)["forward"].flops


def marks(rows: list[Row]) -> list[Mark]:
    """What must hold of the steps of one model in one mask space."""
    found = []
    for keep in sorted({float(row["keep"]) for row in rows if row["op"] == "train_tune"}, reverse=True):
        limit = flop_limit(next(row for row in rows if row["op"] == "train_tune" and row["keep"] == keep))
        ratio = best(rows, "train_tune", "stock", keep) / best(rows, "train_tune", "ours", keep)
        what = f"tune at {keep:.0%} kept over stock LoRA on the dense model, {ratio:.3f}x, as a share of {limit:.3f}x"
        found.append(Mark(what, ratio / limit, 0.90))
    stock, opened = (best(rows, "train_open", variant, 0.6) for variant in ("stock", "ours"))
    found.append(Mark("open step over stock LoRA", stock / opened, 1.0))
    ours = best(rows, "train_search", "ours", 0.6)
    for variant, bound in (("unfused", 1.25), ("stock", 1.0)):
        what = f"LoRA step in search at 60% kept over {variant}"
        found.append(Mark(what, best(rows, "train_search", variant, 0.6) / ours, bound))
    decision, dense = (best(rows, "train_decision", variant, 0.6) for variant in ("ours", "floor"))
    found.append(Mark("decision step in dense forward + backward to activations", decision / dense, 1.15, at_most=True))
    return found


def line(row: Row) -> str:
    """One step for a reader."""
    speed = 1e3 * int(row["tokens"]) / float(row["p50_ms"])
    return (
        f"{row['op']:<14} {row['part']:<8} keep {row['keep']:<4g} {row['dtype']:<8} {row['variant']:<11} "
        f"{row['p50_ms']:>9.1f} ms {speed:>9.0f} tokens/s {row['speedup']:>6}x {row['base']:<7} "
        f"peak {row['peak_mib'] + row['held_mib']:>8.0f} MiB  {row['share_of_limit']:>6.1%} of the FLOP limit"
    )


def chosen(op: Op, options: argparse.Namespace) -> list[Case]:
    """The cases of a step that the options name, at each share to keep that a mark asks for."""
    return [
        case
        for keep in KEEPS[op.name]
        for case in cases(
            op, models=[options.model], dtypes=options.dtype, ranks=[options.rank],
            tokens=[options.batch * options.length], parts=[options.part], keep=keep, device=options.device,
            length=options.length, checkpointing=options.checkpointing,
        )
    ]  # fmt: skip


def parser() -> argparse.ArgumentParser:
    """Options of the script."""
    cuda = torch.cuda.is_available()
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--model", default="1b" if cuda else "smollm2-135m")
    options.add_argument("--part", default="kv_group", choices=("kv_group", "head_dim"), help="mask space")
    options.add_argument("--batch", type=int, default=4)
    options.add_argument("--length", type=int, default=1024 if cuda else 256)
    options.add_argument("--rank", type=int, default=8)
    options.add_argument("--dtype", nargs="+", default=["bfloat16"] if cuda else ["float32", "bfloat16"])
    options.add_argument("--op", nargs="+", default=list(KEEPS), choices=list(KEEPS))
    options.add_argument("--checkpointing", action="store_true", help="of activations")
    options.add_argument("--rounds", type=int, default=10 if cuda else 5)
    options.add_argument("--threads", type=int, default=None if cuda else 2)
    options.add_argument("--device", default="cuda" if cuda else "cpu", choices=("cpu", "cuda"))
    options.add_argument("--tflops", type=float, help="limit of the device; default: measured by a matrix product")
    options.add_argument("--variants", nargs="+", help="default all; without all of them no marks are printed")
    options.add_argument("--no-verify", action="store_true")
    options.add_argument("--lenient", action="store_true", help="exit with 0 though a mark is missed")
    options.add_argument("--out", type=Path, default=RESULTS)
    return options


def main(arguments: list[str] | None = None) -> int:
    """Measures the steps, prints them and the marks, and returns the exit status."""
    options = parser().parse_args(arguments)
    if options.threads:
        torch.set_num_threads(options.threads)
    gate = allow(find_ops(options.op), skip=options.no_verify)
    where = environment(options.device) | {"gate": gate}
    limits_of, rows = LimitsOf(options.tflops), []
    for op in find_ops(options.op):
        for case in chosen(op, options):
            with held_heads():  # as the trainer does, phase by phase
                measured, skipped = measure_case(
                    op, case, passes=["full"], rounds=options.rounds, limits=limits_of(case), wanted=options.variants
                )
            append(options.out / f"{op.name}.csv", [where | row for row in measured])
            left_out = [f"{name} left out: {reason}" for name, reason in skipped.items()]
            print(*map(line, measured), *left_out, sep="\n", flush=True)
            rows += measured
    if options.variants or len(options.op) < len(KEEPS):
        return 0
    return conclude(marks(rows)) and not options.lenient


if __name__ == "__main__":
    sys.exit(main())
