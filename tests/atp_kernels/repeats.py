"""Native results must not depend on the run, the number of threads or the instruction set."""

import os
import subprocess
import sys
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from atp_kernels import extension

_DIGEST = """
import hashlib, importlib, torch
from atp_kernels import extension
print(extension.build_info()["isa"])
for module, tensors in {tensors!r}.items():
    digest = hashlib.sha256()
    for tensor in eval(tensors, {{"t": importlib.import_module("tests.atp_kernels." + module)}}):
        digest.update(tensor.flatten().view(torch.uint8).numpy().tobytes())
    print(module, digest.hexdigest())
"""


def run_with_isa(isa: str, code: str) -> subprocess.CompletedProcess[str]:
    """Run Python code in a process of its own whose extension takes this instruction set."""
    root = Path(__file__).parents[2]
    environment = {**os.environ, "ATP_KERNELS_ISA": isa, "PYTHONPATH": os.pathsep.join([str(root), *sys.path])}
    return subprocess.run([sys.executable, "-c", code], cwd=root, env=environment, capture_output=True, text=True)


def assert_same_on_every_isa(tensors: Mapping[str, str]) -> None:
    """Of test modules, expressions in names of each as `t` have the same bits on all sets that run here."""
    compiled, best = extension.build_info()["isa_compiled"], extension.build_info()["isa"]
    names = compiled[: compiled.index(best) + 1]
    results = [run_with_isa(isa, _DIGEST.format(tensors=dict(tensors))) for isa in names]
    assert [result.returncode for result in results] == [0] * len(results), results[-1].stderr
    said = [result.stdout.splitlines() for result in results]
    assert [lines[0] for lines in said] == names
    assert all(len(lines) == 1 + len(tensors) and lines[1:] == said[0][1:] for lines in said)


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
