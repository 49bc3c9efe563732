"""The CUDA sources compute on a CPU what the extension's CPU code does; under sanitizers with --all."""

import shutil

import cuda_on_cpu
import pytest
from cuda_on_cpu import CUDA, FAULTS, PLAIN, SHIM, rewritten
from sanitize import compiler

from atp_kernels import extension

if not extension.AVAILABLE:
    pytest.skip(extension.REASON, allow_module_level=True)
if shutil.which(compiler()) is None:
    pytest.skip(f"there is no {compiler()}", allow_module_level=True)


@pytest.fixture(autouse=True)
def own_folder(tmp_path, monkeypatch):
    monkeypatch.setattr(cuda_on_cpu, "BUILT", tmp_path)


def test_results_are_those_of_the_cpu_code_and_a_wrong_one_is_found():
    done = cuda_on_cpu.called(PLAIN, cuda_on_cpu.build(PLAIN), 3)
    assert done.stdout == "12 calls agree\n", done.stderr[-3000:]
    wrong = "group.cu", "removed[group] ? shrunk : 1.0f", "shrunk", None
    done = cuda_on_cpu.called(PLAIN, cuda_on_cpu.build(PLAIN, wrong), 3)
    assert done.returncode and "Tensor-likes are not close" in done.stderr


def test_every_kernel_is_rewritten():
    kernels = launches = 0
    for path in CUDA.glob("*.cu"):
        source = path.read_text()
        kernels += source.count("__global__")
        launches += rewritten(source).count("shim::run(")
        assert rewritten(source).count("<<<") == 0
    assert 0 < kernels <= launches
    assert (SHIM / "cuda_runtime.h").is_file()


@pytest.mark.slow
@pytest.mark.parametrize("part", FAULTS)
def test_sanitizers_report_nothing_but_the_fault_made_on_purpose(part):
    assert cuda_on_cpu.check(part, calls=5)
