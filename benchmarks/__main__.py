"""The command line of the benchmarks.

    python -m benchmarks run --op 'linear_hard_*' --model llama2-7b --rank 8 --dtype float32
    python -m benchmarks verify | check | plot | table | list

`run` first runs the operations' tests and times nothing on a red gate; rows are appended to RESULTS/OP.csv.
"""

import argparse
import sys
from pathlib import Path

import torch

from benchmarks.agreement import disagreements
from benchmarks.case import PASSES, Case, Op
from benchmarks.gate import allow, verify
from benchmarks.plots import plot
from benchmarks.records import RESULTS, append, environment, read
from benchmarks.registry import OPS, cases, find_ops
from benchmarks.run import LimitsOf, measure_case, overview, table
from benchmarks.shapes import MODELS

KERNELS = [op.name for op in OPS if not op.name.startswith("train_")]
CUDA = torch.cuda.is_available()


def parser() -> argparse.ArgumentParser:
    """Options of all commands; the defaults suit the device at hand."""
    root = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__.splitlines()[0])
    commands = root.add_subparsers(dest="command", required=True)
    chosen = argparse.ArgumentParser(add_help=False)
    chosen.add_argument("--op", nargs="+", default=KERNELS, help="names or patterns")
    which = argparse.ArgumentParser(add_help=False)
    which.add_argument("--model", nargs="+", default=["llama2-7b"] if CUDA else ["smollm2-135m"])
    which.add_argument("--part", nargs="+", default=[], help="linears or other parts of the model; default all")
    which.add_argument("--rank", nargs="+", type=int, default=[16])
    which.add_argument("--dtype", nargs="+", default=["bfloat16"] if CUDA else ["float32", "bfloat16"])
    which.add_argument("--tokens", nargs="+", type=int, default=[8192] if CUDA else [1024])
    which.add_argument("--keep", type=float, default=0.6, help="share of a masked side that stays")
    which.add_argument("--length", type=int, default=256, help="tokens of a window, for training steps")
    which.add_argument("--checkpointing", action="store_true", help="of activations, for training steps")
    which.add_argument("--device", default="cuda" if CUDA else "cpu", choices=("cpu", "cuda"))
    which.add_argument("--threads", type=int, default=None if CUDA else 2)
    which.add_argument("--variants", nargs="+", help="default all")
    run = commands.add_parser("run", parents=[chosen, which], help="time cases and append rows")
    run.add_argument("--passes", nargs="+", default=list(PASSES), choices=PASSES)
    run.add_argument("--rounds", type=int, default=30 if CUDA else 9)
    run.add_argument("--tflops", type=float, help="limit of the device; default: measured by a matrix product")
    run.add_argument("--tbps", type=float, help="limit of its memory in TB/s; default: measured by a copy")
    run.add_argument("--no-verify", action="store_true", help="time without running the tests; rows say unverified")
    run.add_argument("--out", type=Path, default=RESULTS)
    commands.add_parser("verify", parents=[chosen], help="run the operations' tests")
    commands.add_parser("check", parents=[chosen, which], help="see that all variants of a case compute the same")
    drawn = commands.add_parser("plot", parents=[chosen], help="draw a PNG an operation from the rows (matplotlib)")
    drawn.add_argument("--out", type=Path, default=RESULTS)
    shown = commands.add_parser("table", help="print the newest rows: p50, speed-up, share of limit, peak + held")
    shown.add_argument("--out", type=Path, default=RESULTS)
    commands.add_parser("list", help="operations and models")
    return root


def chosen_cases(op: Op, options: argparse.Namespace) -> list[Case]:
    """The cases of an operation that the options name."""
    same = {name: getattr(options, name) for name in ("device", "keep", "length", "checkpointing")}
    return cases(
        op, models=options.model, dtypes=options.dtype, ranks=options.rank, tokens=options.tokens, parts=options.part,
        **same,
    )  # fmt: skip


def run(ops: list[Op], options: argparse.Namespace) -> None:
    """Times all chosen cases; rows are written case by case, so that an interrupted run keeps what it has."""
    gate = allow(ops, skip=options.no_verify)
    where = environment(options.device) | {"gate": gate}
    limits_of = LimitsOf(options.tflops, options.tbps)
    for op in ops:
        for case in chosen_cases(op, options):
            rows, skipped = measure_case(
                op, case, passes=options.passes, rounds=options.rounds, limits=limits_of(case), wanted=options.variants
            )
            append(options.out / f"{op.name}.csv", [where | row for row in rows])
            print(table(case, rows, skipped), f"({gate})", flush=True)


def check(ops: list[Op], options: argparse.Namespace) -> None:
    """Exits with 1 when a variant that should compute the operation's function does not."""
    wrong = [
        f"{case}: {what}"
        for op in ops
        for case in chosen_cases(op, options)
        for what in disagreements(op, case, options.variants)
    ]
    print("\n".join(wrong) or "all variants agree")
    sys.exit(bool(wrong))


def main(arguments: list[str] | None = None) -> None:
    """Runs one command."""
    options = parser().parse_args(arguments)
    if getattr(options, "threads", None):
        torch.set_num_threads(options.threads)
    if options.command == "list":
        print("operations:", *(op.name for op in OPS))
        print("models:    ", *MODELS)
        return
    if options.command == "table":
        print(*(overview(op, read(options.out / f"{op.name}.csv")) for op in OPS), sep="", end="")
        return
    try:
        ops = find_ops(options.op)
    except ValueError as error:
        sys.exit(str(error))
    if options.command == "verify":
        sys.exit(0 if verify(ops) else 1)
    if options.command == "plot":
        print("\n".join(str(path) for path in plot(ops, options.out)))
        return
    {"run": run, "check": check}[options.command](ops, options)


if __name__ == "__main__":
    main()
