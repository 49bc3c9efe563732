"""Every kernel compiles for the GPU generations in the gate, within their limits, on a machine without a GPU."""

import os
import subprocess
import sys

import pytest

pytest.importorskip("triton")
ENVIRONMENT = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}


def offline(*arguments):
    command = [sys.executable, "-m", "atp_kernels.offline", *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT)


def rows(output):
    header, *lines = output.splitlines()
    names = ["dtype", "rank", "arch", "regs", "shared", "stack", "local", "tensor", "16-byte", "2-byte"]
    return [dict(zip(["kernel", *names], [line[:24].strip(), *line[24:].split()], strict=False)) for line in lines]


FORWARD = {f"gemm fwd {which}" for which in ("split", "decision", "narrow", "1024 rows", "128 rows")}
GEMMS = FORWARD | {"gemm dx", "gemm dx decision"}
GEMMS |= {f"{name} dropout" for name in ("gemm dx", "gemm dx decision", "gemm dx narrow")}
GROUPS = {"slot squares", "group slope", "group add", "group shrink", "slot norms", "joint norms", "lasso total"}
NORM = {f"norm {which}" for which in ("fwd narrow", "fwd", "fwd wide", "dx narrow", "dx", "dx wide")}
NORM |= {"norm dx dw narrow", "norm dx dw", "norm dw"}
GATED = {f"{act}{mask} {way}" for act in ("silu", "gelu") for mask in ("", " hard", " soft") for way in ("fwd", "bwd")}
KERNELS = GEMMS | GROUPS | NORM | GATED | {"gemm fwd decode", "down", "column reduce", "sum partials"}
KERNELS |= {"down dropout", "column reduce dropout", "dropout"}
ARCHS = {"80", "90", "100", "120"}


def check(dtype, rank):
    """The gate passes; it covers every kernel on every generation, and each 16-bit GEMM runs on its tensor cores."""
    done = offline("--gate", "--dtype", dtype, "--rank", rank)
    assert done.returncode == 0, done.stdout + done.stderr
    table = rows(done.stdout)
    assert sorted((row["kernel"], row["arch"]) for row in table) == sorted((k, arch) for k in KERNELS for arch in ARCHS)
    assert all(row["dtype"] == ("any" if row["kernel"] in GROUPS else dtype) for row in table)
    assert all(row["rank"] == ("0" if row["kernel"] in NORM | GATED | {"dropout"} else rank) for row in table)
    assert all(int(row["tensor"]) > 0 for row in table if row["kernel"] in GEMMS and dtype != "fp32")


def test_gate():
    """The widest rank in the training dtype: the most registers and shared memory. About half a minute of one core."""
    check("bf16", "64")


@pytest.mark.slow
@pytest.mark.parametrize(("dtype", "rank"), [("bf16", "8"), ("fp16", "16"), ("fp32", "16")])
def test_gate_for_other_ranks_and_dtypes(dtype, rank):
    check(dtype, rank)


def test_the_gate_fails_when_a_limit_is_broken():
    code = (
        "import torch\n"
        "from dataclasses import replace\n"
        "from atp_kernels import offline\n"
        "case = next(case for case in offline.every_case([torch.bfloat16], [8]) if case.tensor_core_loop)\n"
        "good = offline.Usage(registers=128, shared=1, stack=0, local=0,\n"
        "                     tensor_core=1, wide_copies=1, narrow_loads=0)\n"
        "assert offline.problems(case, 90, good) == []\n"
        "for change in (dict(stack=65), dict(local=99), dict(shared=2**20), dict(tensor_core=0), dict(wide_copies=0),\n"
        "               dict(narrow_loads=1)):\n"
        "    assert len(offline.problems(case, 90, replace(good, **change))) == 1, change\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=ENVIRONMENT)
    assert done.returncode == 0, done.stderr


def test_the_interpreter_is_refused():
    command = [sys.executable, "-m", "atp_kernels.offline"]
    done = subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT | {"TRITON_INTERPRET": "1"})
    assert done.returncode == 2 and "unset it" in done.stderr
