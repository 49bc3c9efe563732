"""Compile every Triton kernel for GPU generations that are not here, and read what the compiler made of it.

    python -m atp_kernels.offline --gate          bfloat16, the smallest and the widest common rank, every generation
    python -m atp_kernels.offline --gate --all    every dtype and rank

Registers, stack and local memory come from the cuobjdump in the triton wheel, tensor-core and memory instructions from
the PTX: wgmma on Hopper (90), tcgen05 on data-centre Blackwell (100), mma.sync on Ampere (80) and consumer Blackwell
(120). No GPU and no driver is needed. With `--gate` the exit status is 1 when a limit of `problems` is broken.
"""

import argparse
import importlib
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from atp_kernels import triton_runtime

SHARED_LIMIT = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024, 120: 99 * 1024}
"""Shared memory one program may use, bytes, by compute capability."""
SPILL_LIMIT = 64
"""Bytes of stack or local memory that count as no spill: a few addresses, never a tile."""
TENSOR_CORE = {80: "mma.sync", 90: "wgmma.mma_async", 100: "tcgen05.mma", 120: "mma.sync"}

ARCHS = tuple(SHARED_LIMIT)
QUICK_RANKS = (8, 64)
ALL_RANKS = (8, 16, 32, 64)

TYPES = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}


@dataclass(frozen=True)
class Case:
    """One kernel as one call would launch it: argument types (None for an absent operand) and constants."""

    name: str
    kernel: triton.runtime.JITFunction
    dtype: torch.dtype | None
    """None where one compiled kernel takes every dtype."""
    rank: int
    arguments: dict[str, str | None]
    constants: dict[str, object]
    num_warps: int
    num_stages: int
    tensor_core_loop: bool
    """Whether the loop must use this generation's tensor cores and 16-byte copies: a full GEMM tile of 16-bit data."""


@dataclass(frozen=True)
class Usage:
    """What one compiled kernel takes: registers per thread, bytes of memory, and instruction counts in the PTX."""

    registers: int
    shared: int
    stack: int
    local: int
    tensor_core: int
    wide_copies: int
    narrow_loads: int
    """2-byte global loads inside loops; in an epilogue they cost nothing."""


def every_case(dtypes: Sequence[torch.dtype], ranks: Sequence[int]) -> Iterator[Case]:
    """The kernels of all rooms, from the `cases` of their offline.py."""
    for room in sorted(path.parent.name for path in Path(__file__).parent.glob("*/offline.py")):
        yield from importlib.import_module(f"atp_kernels.{room}.offline").cases(dtypes, ranks)


def case(
    name: str,
    kernel: triton.runtime.JITFunction,
    constants: Mapping[str, object],
    types: Mapping[str, str | None],
    *,
    dtype: torch.dtype | None = None,
    rank: int = 0,
    num_warps: int = 4,
) -> Case:
    """A kernel without tensor cores. types: those of arguments that are neither constant nor i32, None for absent ones.

    dtype: None where one compilation takes every dtype; rank: 0 where it does not matter.
    """
    arguments = {argument: types.get(argument, "i32") for argument in kernel.arg_names if argument not in constants}
    return Case(name, kernel, dtype, rank, arguments, dict(constants), num_warps, 3, False)


def compile_case(case: Case, arch: int) -> Usage:
    """Compile for one architecture (80, 90, 100, 120) and measure. Raises what the compiler raises."""
    absent = {name: None for name, kind in case.arguments.items() if kind is None}
    constants = {**absent, **case.constants}
    signature = {name: "constexpr" if name in constants else case.arguments[name] for name in case.kernel.arg_names}
    # The JIT specialises pointers and sizes that 16 divides; the number of splits is seldom one of them.
    attrs = {
        (parameter.num,): [["tt.divisibility", 16]]
        for parameter in case.kernel.params
        if parameter.name not in constants
        and parameter.name not in ("scaling", "SPLITS", "eps", "n_groups", "n_parts")
        and not parameter.do_not_specialize
    }
    source = ASTSource(case.kernel, signature, constants, attrs)
    options = {"num_warps": case.num_warps, "num_stages": case.num_stages, "enable_fp_fusion": True}
    compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    ptx = compiled.asm["ptx"]
    return Usage(
        **_resources(compiled.asm["cubin"]),
        shared=compiled.metadata.shared,
        tensor_core=ptx.count(TENSOR_CORE[arch]),
        wide_copies=len(re.findall(r"cp\.async\.cg\.shared\.global[^;]*, 0x10", ptx)),
        narrow_loads=sum(len(re.findall(r"ld\.global[.\w:]*\.[bu]16", body)) for _, body in _loops(ptx)),
    )


def _loops(ptx: str) -> list[tuple[str, str]]:
    """(label, body) of each innermost loop: from a label to a branch back to it, with no other label between."""
    return re.findall(r"^(\$L__BB\w+):((?:(?!^\$L__BB)[\s\S])*?)bra(?:\.uni)?\s+\1;", ptx, re.MULTILINE)


def _resources(cubin: bytes) -> dict[str, int]:
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        dump = subprocess.run([tool, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True)
    found = {key: int(value) for key, value in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", dump.stdout)}
    return {"registers": found["REG"], "stack": found["STACK"], "local": found["LOCAL"]}


def problems(case: Case, arch: int, usage: Usage) -> list[str]:
    """The limits this compiled kernel breaks, in words; empty when it is fit to launch."""
    found = []
    if max(usage.stack, usage.local) > SPILL_LIMIT:
        found.append(f"spills {max(usage.stack, usage.local)} bytes")
    if usage.shared > SHARED_LIMIT[arch]:
        found.append(f"needs {usage.shared} bytes of shared memory of {SHARED_LIMIT[arch]}")
    if case.tensor_core_loop and usage.tensor_core == 0:
        found.append(f"uses no {TENSOR_CORE[arch]}")
    if case.tensor_core_loop and usage.wide_copies == 0:
        found.append("has no 16-byte asynchronous copy")
    if case.dtype != torch.float32 and usage.narrow_loads > 0:
        found.append(f"has {usage.narrow_loads} 2-byte global loads")
    return found


def main(arguments: list[str] | None = None) -> int:
    """Print the table; return 1 when `--gate` is given and a limit is broken, else 0."""
    parser = argparse.ArgumentParser(prog="python -m atp_kernels.offline", description=__doc__.splitlines()[0])
    parser.add_argument("--arch", type=int, action="append", choices=ARCHS, help="default: all four")
    parser.add_argument("--rank", type=int, action="append", help="LoRA rank; default: 8 and 64")
    parser.add_argument("--all", action="store_true", help="default to every dtype and every rank of 8, 16, 32, 64")
    parser.add_argument("--dtype", action="append", choices=sorted(TYPES.values()), help="default: bf16")
    parser.add_argument("--gate", action="store_true", help="fail when a limit is broken")
    options = parser.parse_args(arguments)
    if triton_runtime.INTERPRETED:
        parser.error("TRITON_INTERPRET is set, so there is nothing to compile: unset it.")
    names = options.dtype or (list(TYPES.values()) if options.all else ["bf16"])
    ranks = options.rank or (ALL_RANKS if options.all else QUICK_RANKS)
    every = every_case([dtype for dtype, name in TYPES.items() if name in names], ranks)
    broken = 0
    print(f"{'kernel':24} dtype rank arch  regs  shared stack local tensor 16-byte 2-byte")
    for case in every:
        for arch in options.arch or ARCHS:
            usage = compile_case(case, arch)
            verdict = problems(case, arch, usage)
            broken += bool(verdict)
            dtype = TYPES[case.dtype] if case.dtype else "any"
            print(
                f"{case.name:24} {dtype:5} {case.rank:4} {arch:4} {usage.registers:5} "
                f"{usage.shared:7} {usage.stack:5} {usage.local:5} {usage.tensor_core:6} {usage.wide_copies:7} "
                f"{usage.narrow_loads:6}  {'; '.join(verdict)}",
                flush=True,
            )
    return 1 if broken and options.gate else 0


if __name__ == "__main__":
    sys.exit(main())
