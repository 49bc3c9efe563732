"""Compile every Triton kernel for GPU generations that are not here, and read what the compiler made of it.

    python -m atp_kernels.offline --gate          bfloat16, the smallest and the widest common rank, every generation
    python -m atp_kernels.offline --gate --all    every dtype, rank and variant

Registers, stack and local memory come from the cuobjdump in the triton wheel, tensor-core and memory instructions from
the PTX: wgmma on Hopper (90), tcgen05 on data-centre Blackwell (100), mma.sync on Ampere (80) and consumer Blackwell
(120). Of AMD's CDNA 3 (gfx942) and RDNA 3 (gfx1100) all of it is read from the assembly. No GPU
and no driver is needed. With `--gate` the exit status is 1 when a limit of `problems` is broken.
"""

import argparse
import importlib
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from atp_kernels import triton_runtime

Arch = int | str
"""A compute capability of NVIDIA, or the name of an AMD target."""
SHARED_LIMIT: dict[Arch, int] = {
    **{80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024, 120: 99 * 1024},
    **{"gfx942": 64 * 1024, "gfx1100": 64 * 1024},
}
"""Shared memory one program may use, bytes."""
TENSOR_MEMORY_LIMIT = 512
"""Columns of tensor memory (100): where one program takes more, the compiler leaves an empty kernel behind."""
SPILL_LIMIT = 64
"""Bytes of stack or local memory that count as no spill: a few addresses, never a tile."""
TENSOR_CORE: dict[Arch, str] = {
    **{80: "mma.sync", 90: "wgmma.mma_async", 100: "tcgen05.mma", 120: "mma.sync"},
    **{"gfx942": "v_mfma", "gfx1100": "v_wmma"},
}

ARCHS: tuple[Arch, ...] = (80, 90, 100, 120, "gfx942", "gfx1100")
"""Those that the gate covers."""
WITH_PRODUCTS = tuple(arch for arch in ARCHS if arch != "gfx1100")
"""Where the kernels of products are launched: `triton_runtime.lacks_registers` says why they are not on RDNA."""
QUICK_RANKS = (8, 64)
ALL_RANKS = (8, 16, 32, 64, 128)

TYPES = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}


@dataclass(frozen=True)
class OfflineCase:
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
    of_ones: bool = False
    """Whether a size is 1, where no access can be wide."""
    archs: tuple[Arch, ...] = ARCHS
    """Where it is launched."""
    descriptors: bool = False
    """Whether matrices come by tensor descriptors."""
    extra: bool = False
    """Whether only `--all` compiles it: another variant shows nearly the same."""


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
    bulk_copies: int = 0
    """Copies by the tensor memory accelerator."""
    tensor_memory: int = 0
    """Columns, on 100."""


def every_case(dtypes: Sequence[torch.dtype], ranks: Sequence[int]) -> Iterator[OfflineCase]:
    """The kernels of all rooms, from the `cases` of their offline.py, and the first of each kernel for sizes of 1."""
    for room in sorted(path.parent.name for path in Path(__file__).parent.glob("*/offline.py")):
        seen = set()
        for case in importlib.import_module(f"atp_kernels.{room}.offline").cases(dtypes, ranks):
            yield case
            if case.kernel not in seen:
                seen.add(case.kernel)
                yield from of_ones(case)


def of_ones(case: OfflineCase) -> Iterator[OfflineCase]:
    """The case with 1 for its number of rows, and for every integer: the JIT makes a constant of each that is 1.

    A constant is no tensor to the compiler, so a kernel may compile for one and not for the other.
    """
    never = {parameter.name for parameter in case.kernel.params if parameter.do_not_specialize}
    integers = [name for name, kind in case.arguments.items() if kind == "i32" and name not in never]
    for word, names in (("one row", [name for name in integers if name == "M"]), ("ones", integers)):
        if names:
            yield replace(
                case,
                name=f"{case.kernel.__name__.removesuffix('_kernel')} {word}",
                arguments={name: kind for name, kind in case.arguments.items() if name not in names},
                constants=case.constants | dict.fromkeys(names, 1),
                tensor_core_loop=False,
                of_ones=True,
            )


def case(
    name: str,
    kernel: triton.runtime.JITFunction,
    constants: Mapping[str, object],
    types: Mapping[str, str | None],
    *,
    dtype: torch.dtype | None = None,
    rank: int = 0,
    num_warps: int = 4,
) -> OfflineCase:
    """A kernel without tensor cores. types: those of arguments that are neither constant nor i32, None for absent ones.

    dtype: None where one compilation takes every dtype; rank: 0 where it does not matter.
    """
    arguments = {argument: types.get(argument, "i32") for argument in kernel.arg_names if argument not in constants}
    return OfflineCase(name, kernel, dtype, rank, arguments, dict(constants), num_warps, 3, False)


def compile_case(case: OfflineCase, arch: Arch) -> Usage:
    """Compile for one architecture and measure. Raises what the compiler raises."""
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
        and not str(signature[parameter.name]).startswith("tensordesc")
    }
    source = ASTSource(case.kernel, signature, constants, attrs)
    options: dict[str, object] = {"num_warps": case.num_warps, "num_stages": case.num_stages, "enable_fp_fusion": True}
    if isinstance(arch, str):
        target = GPUTarget("hip", arch, 64 if arch.startswith("gfx9") else 32)
        options["num_stages"] = min(case.num_stages, triton_runtime.AMD_STAGES)
        compiled = triton.compile(source, target=target, options=options)
        return _amd_usage(compiled, arch)
    compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    ptx = compiled.asm["ptx"]
    return Usage(
        **_resources(compiled.asm["cubin"]),
        shared=compiled.metadata.shared,
        tensor_core=ptx.count(TENSOR_CORE[arch]),
        wide_copies=len(re.findall(r"cp\.async\.cg\.shared\.global[^;]*, 0x10", ptx)),
        narrow_loads=sum(len(re.findall(r"ld\.global[.\w:]*\.[bu]16", body)) for _, body in _loops(ptx)),
        bulk_copies=ptx.count("cp.async.bulk.tensor"),
        tensor_memory=compiled.metadata.tmem_size or 0,
    )


def _amd_usage(compiled: triton.compiler.CompiledKernel, arch: Arch) -> Usage:
    assembly = compiled.asm["amdgcn"]
    found = {key: int(value) for key, value in re.findall(r"\.(\w+):\s+(\d+)$", assembly, re.MULTILINE)}
    return Usage(
        registers=found["vgpr_count"],
        stack=found["private_segment_fixed_size"],
        local=4 * found["vgpr_spill_count"],
        shared=compiled.metadata.shared,
        tensor_core=assembly.count(TENSOR_CORE[arch]),
        wide_copies=len(re.findall(r"(?:global|buffer)_load_(?:dwordx4|b128)", assembly)),
        narrow_loads=sum(
            len(re.findall(r"(?:global|buffer)_load_(?:ushort|short|u16|d16)", body))
            for _, body in _amd_loops(assembly)
        ),
    )


def _amd_loops(assembly: str) -> list[tuple[str, str]]:
    """As `_loops`."""
    return re.findall(r"^(\.LBB\w+):((?:(?!^\.LBB)[\s\S])*?)s_c?branch\w*\s+\1$", assembly, re.MULTILINE)


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


def problems(case: OfflineCase, arch: Arch, usage: Usage) -> list[str]:
    """The limits this compiled kernel breaks, in words; empty when it is fit to launch."""
    found = []
    if max(usage.stack, usage.local) > SPILL_LIMIT:
        found.append(f"spills {max(usage.stack, usage.local)} bytes")
    if usage.shared > SHARED_LIMIT[arch]:
        found.append(f"needs {usage.shared} bytes of shared memory of {SHARED_LIMIT[arch]}")
    if case.tensor_core_loop and usage.tensor_core == 0:
        found.append(f"uses no {TENSOR_CORE[arch]}")
    if usage.tensor_memory > TENSOR_MEMORY_LIMIT:
        found.append(f"needs {usage.tensor_memory} columns of tensor memory of {TENSOR_MEMORY_LIMIT}")
    if case.descriptors and usage.bulk_copies == 0:
        found.append("has no copy by the tensor memory accelerator")
    if case.tensor_core_loop and not case.descriptors and usage.wide_copies == 0:
        found.append("has no 16-byte asynchronous copy")
    if case.dtype != torch.float32 and not case.of_ones and usage.narrow_loads > 0:
        found.append(f"has {usage.narrow_loads} 2-byte global loads")
    return found


def main(arguments: list[str] | None = None) -> int:
    """Print the table; return 1 when `--gate` is given and a limit is broken, else 0."""
    parser = argparse.ArgumentParser(prog="python -m atp_kernels.offline", description=__doc__.splitlines()[0])
    known = {str(arch): arch for arch in SHARED_LIMIT}
    parser.add_argument("--arch", action="append", choices=known, help=f"default: {', '.join(map(str, ARCHS))}")
    parser.add_argument("--rank", type=int, action="append", help="LoRA rank; default: 8 and 64")
    parser.add_argument("--all", action="store_true", help="every variant; default to every dtype and rank of 8 to 128")
    parser.add_argument("--dtype", action="append", choices=sorted(TYPES.values()), help="default: bf16")
    parser.add_argument("--gate", action="store_true", help="fail when a limit is broken")
    options = parser.parse_args(arguments)
    if triton_runtime.INTERPRETED:
        parser.error("TRITON_INTERPRET is set, so there is nothing to compile: unset it.")
    names = options.dtype or (list(TYPES.values()) if options.all else ["bf16"])
    ranks = options.rank or (ALL_RANKS if options.all else QUICK_RANKS)
    every = every_case([dtype for dtype, name in TYPES.items() if name in names], ranks)
    archs = [known[name] for name in options.arch or map(str, ARCHS)]
    broken = 0
    print(f"{'kernel':36} dtype rank   arch  regs  shared stack local tensor 16-byte 2-byte tma")
    for case in every:
        if case.extra and not options.all:
            continue
        for arch in (arch for arch in archs if arch in case.archs):
            usage = compile_case(case, arch)
            verdict = problems(case, arch, usage)
            broken += bool(verdict)
            dtype = TYPES[case.dtype] if case.dtype else "any"
            print(
                f"{case.name:36} {dtype:5} {case.rank:4} {arch:>6} {usage.registers:5} "
                f"{usage.shared:7} {usage.stack:5} {usage.local:5} {usage.tensor_core:6} {usage.wide_copies:7} "
                f"{usage.narrow_loads:6} {usage.bulk_copies:3}  {'; '.join(verdict)}",
                flush=True,
            )
    return 1 if broken and options.gate else 0


if __name__ == "__main__":
    sys.exit(main())
