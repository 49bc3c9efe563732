"""The CUDA sources of the extension on a CPU, under sanitizers: no GPU and no CUDA toolkit is needed.

    python tests/cuda_on_cpu.py                        both parts: addresses and undefined behaviour, then threads
    python tests/cuda_on_cpu.py thread --calls 50      one of them, with more calls of each operation

The sources are compiled for the CPU beside the headers in sanitizers/cuda, with a thread for each thread of a block, a
barrier for __syncthreads, and blocks of 32 threads, so that small operands take several blocks. Results must be those
of the extension's CPU code. First faults are made in the sources on purpose; a part that does not report one fails.
"""

import os
import re
import subprocess
import sys

from sanitize import BUILT, PARTS, ROOT, compiler, main, run
from torch.utils import cpp_extension

CUDA, SHIM = ROOT / "csrc" / "cuda", ROOT / "tests" / "sanitizers" / "cuda"
THREADS = 32
PLAIN = "plain"
"""A build without a sanitizer: whether results are right."""
BARRIER = "partial[threadIdx.x + half];\n    __syncthreads();"
FAULTS = {  # part -> (file, what it says, what it says then, what the report says)
    "address": ("group.cu", "if (slot >= factor.slots())", "if (slot > factor.slots())", "heap-buffer-overflow"),
    "thread": ("group.cu", BARRIER, BARRIER.replace("__syncthreads();", ""), "data race"),
}


def rewritten(source):
    """A CUDA source in C++: launches, shared arrays, and the library and device that it registers for."""
    launch, shared = r"(\w+(?:<\w+>)?)<<<(.+?), kThreads, 0, stream>>>\(", r"__shared__ (\w+) (\w+)\[(\w+)\];"
    source = re.sub(launch, r"shim::run(\2, kThreads, [](auto... a) { \1(a...); }, ", source)
    source = re.sub(shared, r"auto& \2 = shim::shared<\1[\3], __LINE__>();", source)
    source = source.replace("(atp_kernels_native, CUDA, m)", "(atp_cuda_on_cpu, CPU, m)")
    source = source.replace("removed.is_cuda()", "!removed.is_cuda()")
    assert "<<<" not in source and "__shared__" not in source, "what the shim cannot rewrite"
    return source


def build(name, fault=None):
    """The library of a part, with a fault of `FAULTS` in it or without."""
    folder = BUILT / "cuda" / (name if fault is None else f"{name}-fault")
    (folder / "cuda").mkdir(parents=True, exist_ok=True)
    for header in (ROOT / "csrc").glob("*.h"):
        (folder / header.name).write_text(header.read_text())
    launch = (CUDA / "launch.h").read_text()
    (folder / "cuda" / "launch.h").write_text(re.sub(r"kThreads = \d+", f"kThreads = {THREADS}", launch))
    sources = []
    for path in sorted(CUDA.glob("*.cu")):
        text = path.read_text()
        if fault is not None and fault[0] == path.name:
            assert text.count(fault[1]) == 1, f"{path.name} does not say {fault[1]!r} once"
            text = text.replace(fault[1], fault[2])
        sources.append(folder / "cuda" / f"{path.stem}.cpp")
        sources[-1].write_text(rewritten(text))
    module = (ROOT / "csrc" / "module.cpp").read_text()
    operators = re.search(r"STABLE_TORCH_LIBRARY\(atp_kernels_native, m\) \{.*?^\}", module, re.MULTILINE | re.DOTALL)
    sources.append(folder / "operators.cpp")
    named = operators[0].replace("atp_kernels_native", "atp_cuda_on_cpu")
    sources[-1].write_text(f"#include <torch/csrc/stable/library.h>\n{named}\n")
    sanitizers = () if name == PLAIN else PARTS[name].flags
    flags = ["-O1", "-g1", "-std=c++20", "-fPIC", "-fvisibility=hidden", "-fno-omit-frame-pointer", *sanitizers]
    flags += ["-DTORCH_TARGET_VERSION=0x020a000000000000ULL", f"-I{SHIM}"]
    flags += [f"-isystem{path}" for path in cpp_extension.include_paths()]
    library = folder / "library.so"
    found = [word for path in cpp_extension.library_paths() for word in (f"-L{path}", f"-Wl,-rpath,{path}")]
    command = [compiler(), "-shared", *map(str, sources), "-o", str(library), *flags, *found, "-ltorch_cpu", "-pthread"]
    subprocess.run(command, check=True)
    return library


def called(name, library, calls):
    arguments = ["tests/sanitizers/cuda_calls.py", str(library), str(calls)]
    if name != PLAIN:
        return run(name, ROOT, arguments)
    variables = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.run([sys.executable, *arguments], cwd=ROOT, env=variables, capture_output=True, text=True)


def check(name, calls):
    """One part: whether a fault is reported, and nothing else is."""
    fault = FAULTS[name]
    done = called(name, build(name, fault), calls)
    if done.returncode == 0 or fault[3] not in done.stdout:
        print(done.stdout[-3000:], f"the {name} build does not report {fault[2]!r} as {fault[3]!r}", sep="\n")
        return False
    print(f"{name}: reports {fault[2]!r}, made on purpose, as {fault[3]}", flush=True)
    done = called(name, build(name), calls)
    print(*done.stdout.strip().splitlines()[-1 if done.returncode == 0 else -120 :], sep="\n", flush=True)
    return done.returncode == 0


if __name__ == "__main__":
    main(check, 20, "of each operation")
