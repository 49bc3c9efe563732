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
    names = ["dtype", "rank", "arch", "regs", "shared", "stack", "local", "tensor", "16-byte", "2-byte", "tma"]
    return [dict(zip(["kernel", *names], [line[:36].strip(), *line[36:].split()], strict=False)) for line in lines]


FORWARD = {f"gemm fwd {which}" for which in ("split", "decision", "narrow", "1024 rows", "128 rows")}
GEMMS = FORWARD | {"gemm dx", "gemm dx decision"}
GEMMS |= {f"{name} dropout" for name in ("gemm dx", "gemm dx decision", "gemm dx narrow")}
GROUPS = {"slot squares", "group slope", "group add", "group shrink", "slot norms", "joint norms", "lasso total"}
NORM = {f"norm {which}" for which in ("fwd narrow", "fwd", "fwd wide", "dx narrow", "dx", "dx wide")}
NORM |= {f"add {name}" for name in NORM}
NORM |= {"norm dx dw narrow", "norm dx dw", "norm dw"}
GATED = {f"{act}{mask} {way}" for act in ("silu", "gelu") for mask in ("", " hard", " soft") for way in ("fwd", "bwd")}
KERNELS = GEMMS | GROUPS | NORM | GATED | {"gemm fwd decode", "down", "down many rows", "column reduce", "sum partials"}
KERNELS |= {"down dropout", "column reduce dropout", "dropout"}
NORM |= {f"{name} ones" for name in ("rms_norm", "rms_norm_backward", "weight_grad")}
GATED |= {f"{act} observed bwd" for act in ("silu", "gelu")}
GATED |= {f"{name} ones" for name in ("gated", "gated_backward")}
DROPOUT = {"dropout", "dropout, device seed", "dropout ones", "dropout one row"}
OF_ONES = {f"{name} ones" for name in ("masked_lora_gemm", "lora_down", "column_reduce", "sum_partials")}
OF_ONES |= {f"{name} one row" for name in ("masked_lora_gemm", "lora_down", "column_reduce")}
GROUPS |= {"group_norms ones", "total ones"}
ROTARY = {f"rotary {way}{pairs}" for way in ("fwd", "bwd") for pairs in ("", " pairs")} | {"rotary ones"}
LOSS = {"loss", "loss narrow", "cross_entropy ones"}
KERNELS |= NORM | GATED | DROPOUT | OF_ONES | GROUPS | LOSS | ROTARY
ARCHS = {"80", "90", "100", "120", "gfx942"}
QUICK = {"90", "120", "gfx942"}  # the newest of the most shared memory, that of the least, and the wide waves
RDNA = "gfx1100"
"""Of which the gate has what is launched there: no products."""
PRODUCTS = GEMMS | OF_ONES | {"gemm fwd decode", "down", "down many rows", "down dropout", "column reduce"}
PRODUCTS |= {"column reduce dropout", "sum partials"}
# The kernel of descriptors: its tiles and where each is launched.
HALF = {"128x256x64": "90", "128x256x64-warps": "100", "128x128x64": "90 100", "128x128x64-warps": "100"}
HALF |= {"128x128x64-99k": "120"}
HALF = {f"{way} {tile}": archs for tile, archs in HALF.items() for way in ("fwd", "dx")}
HALF |= {"fwd 128x128x64-one-pass": "90 100", "fwd 64x128x64": "90 100", "fwd 64x128x64-99k-one-pass": "120"}
SINGLE = {f"{way} 64x64x32": "90 100 120" for way in ("fwd", "dx")}


def descriptor_kernels(dtype, rank):
    """(kernel, arch) of all that the gate compiles of it."""
    table, first = (SINGLE, "90 100 120") if dtype == "fp32" else (HALF, "90")
    table = table | {f"masked_lora_descriptor {which}": first for which in ("ones", "one row")}
    if dtype != "fp32" and int(rank) <= 16:
        table |= {"fwd 128x256x64-one-pass": "90"}
    return {(kernel, arch) for kernel, archs in table.items() for arch in archs.split()}


def check(dtype, rank, archs=ARCHS):
    """The gate passes; it covers every kernel on these generations, and each 16-bit GEMM runs on its tensor cores."""
    chosen = [word for arch in sorted(archs) for word in ("--arch", arch)]
    done = offline("--gate", "--dtype", dtype, "--rank", rank, *chosen)
    assert done.returncode == 0, done.stdout + done.stderr
    table = rows(done.stdout)
    by_descriptors = {(kernel, arch) for kernel, arch in descriptor_kernels(dtype, rank) if arch in archs}
    expected = {(kernel, arch) for kernel in KERNELS for arch in archs if arch != RDNA or kernel not in PRODUCTS}
    expected |= by_descriptors
    assert sorted((row["kernel"], row["arch"]) for row in table) == sorted(expected)
    assert all((int(row["tma"]) > 0) == ((row["kernel"], row["arch"]) in by_descriptors) for row in table)
    assert all(row["dtype"] == ("any" if row["kernel"] in GROUPS else dtype) for row in table)
    assert all(
        row["rank"] == ("0" if row["kernel"] in NORM | GATED | DROPOUT | LOSS | ROTARY else rank) for row in table
    )
    assert all(int(row["tensor"]) > 0 for row in table if row["kernel"] in GEMMS | HALF.keys() and dtype != "fp32")


def test_gate():
    """A wide rank in the training dtype: many registers and much shared memory. About a minute of one core."""
    check("bf16", "64", QUICK | {RDNA})


@pytest.mark.slow
@pytest.mark.parametrize(
    ("dtype", "rank", "archs"),
    [
        ("bf16", "64", ARCHS - QUICK),
        ("fp32", "16", ARCHS),  # other instructions
        ("bf16", "128", ARCHS),  # most registers and shared memory
        ("fp32", "128", {"80", "120"}),  # the fewest registers and the least shared memory, for the widest entries
        # Small ranks, whose tiles are those of 16, with both 16-bit types between them on every generation.
        ("fp16", "16", {"90", "gfx942"}),
        ("bf16", "8", {"80", "100", "120"}),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_gate_for_other_ranks_and_dtypes(dtype, rank, archs):
    check(dtype, rank, archs)


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
        "assert len(offline.problems(case, 100, replace(good, tensor_memory=513))) == 1\n"
        "case, good = replace(case, descriptors=True), replace(good, wide_copies=0)\n"
        "assert len(offline.problems(case, 90, good)) == 1\n"
        "assert offline.problems(case, 90, replace(good, bulk_copies=1)) == []\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=ENVIRONMENT)
    assert done.returncode == 0, done.stderr


def test_the_interpreter_is_refused():
    command = [sys.executable, "-m", "atp_kernels.offline"]
    done = subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT | {"TRITON_INTERPRET": "1"})
    assert done.returncode == 2 and "unset it" in done.stderr
