"""Tests every operation on a device against its definition in float64, and prints a line for each.

    python -m atp_kernels.selftest
    python -m atp_kernels.selftest --device cuda:1 --fresh

Exit status 1 where an operation failed, or where the device could not be used. What was found is kept for this device
and these versions of torch, triton and kernels; a run on a GPU goes by it.
"""

import argparse
import sys
import time
import warnings
from collections.abc import Sequence

from atp_kernels.child import check_seconds
from atp_kernels.selftest import TIMEOUT, Outcome, Untested, device_of, outcomes


def main(arguments: Sequence[str] | None = None) -> int:
    """Test and print; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m atp_kernels.selftest", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--device", help="cpu or a CUDA device; by default a CUDA device if there is one")
    parser.add_argument("--fresh", action="store_true", help="test again what is known from before")
    parser.add_argument("--timeout", type=float, default=TIMEOUT, metavar="SECONDS", help="of one call (%(default)g)")
    options = parser.parse_args(arguments)
    try:
        check_seconds(options.timeout)
        device = device_of(options.device)
    except ValueError as error:
        parser.error(str(error).rstrip("."))
    started = time.perf_counter()
    warnings.showwarning = lambda message, *rest, **more: print(message, file=sys.stderr)
    try:
        found = outcomes(device, fresh=options.fresh, timeout=options.timeout)
    except Untested as error:
        print(f"The kernels were not tested on {device}: {error}.", file=sys.stderr)
        return 1
    for op, outcome in found.items():
        print(_line(op, outcome))
    failed = sum(outcome.problem is not None for outcome in found.values())
    spent = time.perf_counter() - started
    print(f"{len(found) - failed} of {len(found)} operations are right on {device} ({spent:.2f} s)")
    return 1 if failed else 0


def _line(op: str, outcome: Outcome) -> str:
    """Backend, ok or the reason, largest error over its bound, and seconds."""
    error = "-" if outcome.error is None else f"{outcome.error:.2f}"
    said = "ok" if outcome.problem is None else f"FAILED: {outcome.problem}"
    return f"{op:<30} {outcome.backend:<9} error {error:>5}  {outcome.seconds:6.2f} s  {said}"


if __name__ == "__main__":
    sys.exit(main())
