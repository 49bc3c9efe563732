"""Whether the kernels are right on a device: every operation against its definition, in a child process, once."""

import os
import warnings
from collections.abc import Mapping
from typing import NamedTuple

import torch

from atp_kernels import call
from atp_kernels.child import Child, Lost, check_seconds
from atp_kernels.kinds import typed

TIMEOUT = 120.0
"""Seconds that one call may take: a GPU's first one compiles."""
_TESTS = "atp_kernels.selftest.cases:served"
_REPEAT = "`python -m atp_kernels.selftest --fresh` tests again"


class Outcome(NamedTuple):
    """How an operation did on the backend that "auto" takes.

    problem: why it failed, None where it is right. error: the largest over its bound, None where it is not known.
    """

    backend: str
    problem: str | None
    error: float | None
    seconds: float


class Untested(RuntimeError):
    """The device could not be used at all, which says nothing about kernels."""


@typed
def selftest(
    device: torch.device | str | None = None, *, fresh: bool = False, timeout: float = TIMEOUT
) -> dict[str, str | None]:
    """Every operation's name, with None where its kernels are right on this device, and else the reason why not.

    Each operation runs forward and backward, by the backend that "auto" takes, on a small odd shape and a typical one,
    in float32 and bfloat16, and is held to its definition in float64. It does so in a child process, which may crash
    or hang: `timeout` is in seconds for one call with its compilation. The results are kept beside the tuned tables,
    for this device and these versions of torch, triton and kernels; `fresh` tests again. In this process "auto" takes
    the reference of an operation that failed, with one warning each; a backend that is named is taken as before.
    device: by default a CUDA device if torch sees one, else the CPU. Raises ValueError for a device that is not here,
    and for a timeout that is none.
    Where the device is out of memory, or no child process can use it, a warning says that nothing was tested, and the
    result is empty, as it is for kinds of devices where the reference takes every call.

    >>> selftest("meta")
    {}
    """
    place = device_of(device)
    check_seconds(timeout)
    try:
        return taken_over(outcomes(place, fresh=fresh, timeout=timeout), place)
    except Untested as error:
        warnings.warn(f"The kernels were not tested on {place}: {error}.", RuntimeWarning, stacklevel=3)
        return {}


def device_of(device: torch.device | str | None) -> torch.device:
    """The device that is meant, with its index. Raises ValueError where it is not here."""
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        place = torch.device(device)
    except RuntimeError:
        raise ValueError(f"{device!r} is no device: give cpu, cuda or cuda:1.") from None
    if place.type != "cuda":
        return place
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if (place.index or 0) >= count:
        raise ValueError(f"{place} is not here: torch sees {count} CUDA devices.")
    return torch.device("cuda", torch.cuda.current_device() if place.index is None else place.index)


def outcomes(
    device: torch.device, *, fresh: bool = False, timeout: float = TIMEOUT, tests: str = _TESTS
) -> dict[str, Outcome]:
    """The outcome of every operation: known from before, unless `fresh`, or found now and kept.

    tests: what runs in the child. Raises `Untested`.
    """
    from atp_kernels.selftest import results  # reads every source file, for their digest

    if device.type not in ("cpu", "cuda"):
        return {}
    known = None if fresh else results.read(device)
    if known is not None:
        return {op: Outcome(*values) for op, values in known.items()}
    found = _found(device, timeout, tests)
    results.write(device, {op: list(outcome) for op, outcome in found.items()})
    return found


def taken_over(found: Mapping[str, Outcome], device: torch.device, *, told: bool = True) -> dict[str, str | None]:
    """Make this process go by these outcomes, which it or another one found. told: warn of what failed."""
    failed = {op: outcome for op, outcome in found.items() if outcome.problem is not None}
    reasons = {op: f"{each.backend} failed the self-test: {each.problem}" for op, each in failed.items()}
    call.set_aside(device.type, reasons)
    for op, outcome in failed.items():
        if told:
            instead = "" if outcome.backend == "reference" else " and is computed by reference in this process"
            said = f"{op} failed the self-test on {device}{instead} ({outcome.backend}: {outcome.problem}); {_REPEAT}."
            warnings.warn(said, RuntimeWarning, stacklevel=4)
    return {op: outcome.problem for op, outcome in found.items()}


def _found(device: torch.device, timeout: float, tests: str) -> dict[str, Outcome]:
    # What "auto" takes where nothing else is asked for: a tuned table has held its own ways to float64.
    variables = {"ATP_KERNELS_TABLES": os.devnull, call.ENVIRONMENT: None}
    found: dict[str, Outcome] = {}
    with Child(tests, variables) as child:
        try:
            operations = child.call({"device": str(device)}, timeout)
        except Lost as error:
            raise Untested(str(error)) from None
        for op in operations:
            try:
                told = child.call({"op": op, "device": str(device)}, timeout)
            except Lost as error:
                at = f"{error.at}: " if error.at else ""
                backend = call.select(op, device, torch.bfloat16).name
                told = {"backend": backend, "problem": f"{at}{error}", "error": None, "seconds": 0.0}
            if "unchecked" in told:
                raise Untested(told["unchecked"])
            found[op] = Outcome(**told)
    return found
