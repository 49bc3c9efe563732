"""Memory of freed tensors goes back to the system, and systems without a way to do so are no error."""

import ctypes
import subprocess
import sys

import pytest

from atp.ground import heap

# Tensors below glibc's mmap threshold between small ones that stay: nothing of this is returned by itself.
FREES_IN_PIECES = """
import ctypes, gc, os, torch
from pathlib import Path
from atp.ground import heap

ctypes.CDLL(None).mallopt(-3, 2**25)  # M_MMAP_THRESHOLD, which grows to this by itself in a long run
MIB = 2**20
resident = lambda: int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / MIB
holes = [torch.ones(2000) for _ in range(4000)]  # those that imports have left, in which the small ones would lie
stay, go = [], []
for _ in range(200):
    go.append(torch.ones(MIB // 4))
    stay.append(torch.ones(2000))
full = resident()
del go
freed = resident()
heap.give_back()
print(full - freed, freed - resident())
"""


@pytest.mark.skipif(heap._trim() is None, reason="this C library has no malloc_trim")
def test_freed_tensors_leave_resident_memory():
    found = subprocess.run([sys.executable, "-c", FREES_IN_PIECES], capture_output=True, text=True, check=True)
    by_itself, given_back = map(float, found.stdout.split())
    assert by_itself < 50 and given_back > 150


@pytest.mark.parametrize("failure", [AttributeError, OSError, TypeError])
def test_other_systems_go_without(monkeypatch, failure):
    def missing(name):
        raise failure("no such library or symbol")

    monkeypatch.setattr(ctypes, "CDLL", missing)
    heap._trim.cache_clear()
    try:
        heap.give_back()
        assert heap._trim() is None
    finally:
        heap._trim.cache_clear()
