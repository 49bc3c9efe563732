"""What must hold: no speed-up of an operation whose tests fail, and no speed-up below its mark."""

import os
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import dataclass

from benchmarks.case import Op
from benchmarks.records import ROOT

VERIFIED = "ATP_BENCHMARKS_VERIFIED"
"""gpu_check.sh sets it to 1 where it has run the tests of what is timed, on the device."""


@dataclass(frozen=True)
class Mark:
    """A measured figure beside the one it has to reach, or to stay under."""

    what: str
    value: float
    bound: float
    at_most: bool = False

    @property
    def holds(self) -> bool:
        return self.value <= self.bound if self.at_most else self.value >= self.bound

    def __str__(self) -> str:
        sign = "<=" if self.at_most else ">="
        return f"{'pass' if self.holds else 'FAIL'}  {self.what}: {self.value:.3f} {sign} {self.bound:g}"


def conclude(marks: list[Mark]) -> int:
    """Prints every mark and returns the exit status: 1 if one does not hold."""
    print(*marks, sep="\n")
    print(f"{sum(mark.holds for mark in marks)} of {len(marks)} hold")
    return 0 if marks and all(mark.holds for mark in marks) else 1


def verify(ops: Iterable[Op]) -> bool:
    """Runs the operations' own tests once and says whether they are green."""
    tests = sorted({test for op in ops for test in op.tests})
    return subprocess.run([sys.executable, "-m", "pytest", "-q", "-x", *tests], cwd=ROOT).returncode == 0


def allow(ops: Iterable[Op], *, skip: bool) -> str:
    """What rows say of the gate: `verified`, or `unverified` where it was skipped. Exits on a red gate."""
    if skip:
        return "unverified"
    if os.environ.get(VERIFIED) != "1" and not verify(ops):
        sys.exit("The operations' tests fail, so nothing is timed: mend them, or pass --no-verify.")
    return "verified"
