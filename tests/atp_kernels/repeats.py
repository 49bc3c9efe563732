"""Native results must not depend on the run, the number of threads or the instruction set."""

import os
import subprocess
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from torch import Tensor

from atp_kernels import extension

_DIGEST = """
import hashlib, torch
from tests.atp_kernels import {module} as t
digest = hashlib.sha256()
for tensor in {tensors}:
    digest.update(tensor.flatten().view(torch.uint8).numpy().tobytes())
print(t.extension.build_info()["isa"], digest.hexdigest())
"""


def run_with_isa(isa: str, code: str) -> subprocess.CompletedProcess[str]:
    """Run Python code in a process of its own whose extension takes this instruction set."""
    root = Path(__file__).parents[2]
    environment = {**os.environ, "ATP_KERNELS_ISA": isa, "PYTHONPATH": os.pathsep.join([str(root), *sys.path])}
    return subprocess.run([sys.executable, "-c", code], cwd=root, env=environment, capture_output=True, text=True)


def assert_same_on_every_isa(module: str, tensors: str) -> None:
    """`tensors`, an expression in names of the test module `t`, has the same bits on all sets that run here."""
    compiled, best = extension.build_info()["isa_compiled"], extension.build_info()["isa"]
    names = compiled[: compiled.index(best) + 1]
    results = [run_with_isa(isa, _DIGEST.format(module=module, tensors=tensors)) for isa in names]
    assert [result.returncode for result in results] == [0] * len(results), results[-1].stderr
    said = [result.stdout.split() for result in results]
    assert [name for name, _ in said] == names and len({digest for _, digest in said}) == 1


def assert_repeats(compute: Callable[[], Iterable[Tensor]]) -> None:
    """Ten runs, on one thread and on two in turn, have the bits of the first."""
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        expected = list(compute())
        for run in range(10):
            torch.set_num_threads(1 + run % 2)
            assert all(map(torch.equal, compute(), expected))
    finally:
        torch.set_num_threads(threads)
