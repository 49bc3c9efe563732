"""Times every way to compute the linears of a model on this device, and writes the table that calls then go by.

    python -m atp_kernels.tune --model llama2-7b --tokens 8192 --rank 16 --dtype bfloat16 --device cuda
    python -m atp_kernels.tune --shapes 4096x4096 11008x4096 --regime search --keep 0.6

Each candidate is held to float64 first: one that computes something else is reported, never timed and never taken, and
the exit status is 1. What is timed is a training step of the linear, forward and backward, in turns; the way that is
taken without a table stays unless another is faster by 3 %. Times hold for a machine that does nothing else. On a GPU
all of it happens in a child process, and a candidate that crashes or takes longer than --timeout is left out.
"""

import argparse
import os
import sys
from collections.abc import Sequence
from itertools import product
from pathlib import Path

import torch

from atp_kernels.call import shown
from atp_kernels.child import Child, Lost, check_seconds
from atp_kernels.tuning.apart import SERVED, measured_apart
from atp_kernels.tuning.candidates import Case, Measured, candidates, measured
from atp_kernels.tuning.clock import clock
from atp_kernels.tuning.shapes import MODELS, parse_shape, shapes_of
from atp_kernels.tuning.table import HARD, REGIMES, Entry, file_name, folder, shown_tile, write

DTYPES = {shown(dtype): dtype for dtype in (torch.float32, torch.bfloat16, torch.float16)}


def main(arguments: Sequence[str] | None = None) -> int:
    """Tune and write the table; returns the exit status."""
    options, cases, path = _parsed(arguments)
    device, failed = cases[0].device, False
    print(f"{len(cases)} cases on {device}, into {path}", flush=True)
    with Child(SERVED) as child:
        for case in cases:
            try:
                entry, wrong, today = _measured(child, case, options)
            except Lost as error:
                print(f"{case} is left out: {error}", file=sys.stderr, flush=True)
                failed = True
                continue
            for name, problem in entry.refused.items():
                kind = "is wrong" if name in wrong else "is left out"
                print(f"{case}: {name} {kind}: {problem}", file=sys.stderr, flush=True)
            failed |= bool(wrong)
            if entry.way:
                print(_line(case, entry, today), flush=True)
                # After every case, so that what a stopped run has measured is not lost.
                write(path, device, [entry])
    return int(failed)


def _measured(child: Child, case: Case, options: argparse.Namespace) -> Measured:
    if case.device.type == "cuda":
        return measured_apart(child, case, options.rounds, options.timeout)
    # A CPU compiles no candidate of its own: each is code that calls run anyway, and there is no context to poison.
    found = {candidate.name: candidate for candidate in candidates(case)}
    return measured(case, found, clock(str(case.device)), options.rounds)


def _parsed(arguments: Sequence[str] | None) -> tuple[argparse.Namespace, list[Case], Path]:
    cuda = torch.cuda.is_available()
    lines = (__doc__ or "").splitlines()
    parser = argparse.ArgumentParser(prog="python -m atp_kernels.tune", description=lines[0])
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--model", help=f"a config.json, its folder, or one of {', '.join(MODELS)}")
    what.add_argument("--shapes", nargs="+", metavar="OUTxIN", help="shapes of weights, such as 4096x11008")
    parser.add_argument("--tokens", type=int, nargs="+", default=[8192 if cuda else 1024], help="rows of x")
    parser.add_argument("--rank", type=int, nargs="+", default=[16])
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, default=["bfloat16" if cuda else "float32"])
    parser.add_argument("--device", default="cuda" if cuda else "cpu", help="cpu or a CUDA device")
    parser.add_argument("--regime", nargs="+", choices=REGIMES, default=list(REGIMES))
    parser.add_argument("--keep", type=float, nargs="+", default=[0.6], help="shares that hard masks keep")
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument(
        "--timeout", type=float, default=300.0, help="seconds of a candidate on a GPU to compile and run"
    )
    parser.add_argument("--folder", type=Path, default=folder(), help="of the table; the user's own unless given")
    options = parser.parse_args(arguments)
    for name in ("tokens", "rank", "rounds"):
        values = getattr(options, name)
        if min(values if isinstance(values, list) else [values]) < 1:
            parser.error(f"--{name} is below 1: give positive whole numbers")
    if not all(0 < keep <= 1 for keep in options.keep):
        parser.error("--keep must be above 0 and at most 1")
    if options.folder is None:
        parser.error("there is no cache folder here: name one with --folder")
    try:
        check_seconds(options.timeout)
        device = _device(options.device)
        shapes = shapes_of(options.model) if options.model else [parse_shape(text) for text in options.shapes]
    except ValueError as error:
        parser.error(str(error))
    try:
        options.folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        parser.error(f"the folder {options.folder} cannot be made ({error.strerror}): name another with --folder")
    if not os.access(options.folder, os.W_OK):
        parser.error(f"the folder {options.folder} cannot be written to: name another with --folder")
    sizes = product(options.regime, options.dtype, shapes, options.tokens, options.rank)
    cases = [
        Case(regime, m, n, k, r, DTYPES[dtype], device, keep)
        for regime, dtype, (n, k), m, r in sizes
        for keep in (options.keep if regime in HARD else [1.0])
    ]
    return options, cases, options.folder / file_name(device)


def _device(name: str) -> torch.device:
    """The device of a name. Raises ValueError for one that is not here."""
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ValueError(f"--device {name!r} is no device: give cpu, cuda or cuda:1") from None
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"--device {name} has no candidates: give cpu, cuda or cuda:1")
    if device.type == "cuda":
        index = device.index or 0
        if not torch.cuda.is_available() or index >= torch.cuda.device_count():
            raise ValueError(f"--device {name} is not here: torch sees {torch.cuda.device_count()} CUDA devices")
        torch.cuda.set_device(index)
        return torch.device("cuda", index)
    return torch.device("cpu")


def _line(case: Case, entry: Entry, today: str) -> str:
    times = "  ".join(f"{name} {value:.3f}" for name, value in entry.milliseconds.items())
    tile = "" if entry.tile is None else f" {shown_tile(entry.tile)}"
    if today not in entry.milliseconds:
        return f"{case}: {times} ms -> {entry.way}{tile}"
    gain = entry.milliseconds[today] / entry.milliseconds[f"{entry.way}{tile}"]
    return f"{case}: {times} ms -> {entry.way}{tile} ({gain:.2f}x of today's {today})"


if __name__ == "__main__":
    sys.exit(main())
