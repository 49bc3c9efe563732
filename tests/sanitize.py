"""The C++ of atp_kernels under sanitizers: addresses and undefined behaviour, then threads.

    python tests/sanitize.py                       both parts
    python tests/sanitize.py address               native tests and fuzzed calls, under AddressSanitizer and UBSan
    python tests/sanitize.py thread                fuzzed calls on several threads, under ThreadSanitizer
    python tests/sanitize.py thread --calls 2000   fewer calls per instruction set

Each part builds a copy of the tree in build/sanitize, so the extension in use stays as it is. Before anything else it
calls faults that were made on purpose (sanitizers/faults.cpp) and ends if one of them goes unreported. Needs GCC or
Clang with its sanitizers, on Linux. Exit status 1 for any report or failed test.

Not checked: leaks, since Python itself never frees some of its memory; and the OpenMP threads of torch, for which
sanitizers/threads.cpp stands in.
"""

import argparse
import os
import shutil
import subprocess
import sys
import sysconfig
import time
from collections.abc import Callable
from dataclasses import dataclass
from distutils.core import run_setup  # setuptools brings it, and setup.py imports that
from pathlib import Path

ROOT = Path(__file__).parents[1]
BUILT = ROOT / "build" / "sanitize"
COPIED = ("atp_kernels", "csrc", "benchmarks", "tests/atp_kernels", "tests/sanitizers", "tests/conftest.py")
FILES = ("tests/fuzz_native.py", "setup.py", "pyproject.toml", "README.md", "LICENSE")
ISAS = ("baseline", "avx2", "avx512")
# Tests that call the extension; the Triton ones in between run in its interpreter and are left out.
TESTS = (
    "test_native.py", "test_native_activations.py", "test_native_columns.py", "test_native_linear.py",
    "test_merged_weight.py", "test_rms_norm.py", "test_cross_entropy_kernel.py",
    "test_groups.py", "test_groups_backends.py", "test_groups_direct.py", "test_groups_separate.py", "test_kept.py",
    "test_kept_chunks.py", "test_kept_first.py", "test_strides.py", "test_offsets.py", "test_zero_sizes.py",
    "test_backends_agree.py",
)  # fmt: skip


@dataclass(frozen=True)
class Part:
    """A build: its compiler flags, the libraries to load before Python's own, their settings, and known faults."""

    flags: tuple[str, ...]
    sources: tuple[str, ...]
    preloaded: tuple[str, ...]
    settings: dict[str, str]
    faults: dict[str, str]  # function of faults.cpp and argument -> what the report says


PARTS = {
    "address": Part(
        flags=("-fsanitize=address,undefined", "-fno-sanitize-recover=all"),
        sources=("faults.cpp",),
        # libstdc++ too: AddressSanitizer must find the function that throws, which Python is not linked to.
        preloaded=("libasan.so", "libubsan.so", "libstdc++.so"),
        settings={"ASAN_OPTIONS": "detect_leaks=0 allocator_may_return_null=1", "UBSAN_OPTIONS": "print_stacktrace=1"},
        faults={"atp_fault_heap(7)": "heap-buffer-overflow", "atp_fault_overflow(1 << 40)": "signed integer overflow"},
    ),
    "thread": Part(
        flags=("-fsanitize=thread",),
        sources=("faults.cpp", "threads.cpp"),
        preloaded=("libtsan.so", "libstdc++.so"),
        # Torch and Python were built without it: what they do between themselves is not known to it.
        settings={
            "TSAN_OPTIONS": "ignore_noninstrumented_modules=1 halt_on_error=1 exitcode=66 allocator_may_return_null=1"
        },
        faults={"atp_fault_race(100000)": "data race"},
    ),
}


def compiler() -> str:
    return os.environ.get("CXX", "c++")


def build(name: str) -> Path:
    """A copy of the tree with the extension built for a part; objects whose sources are older are kept."""
    part, root = PARTS[name], BUILT / name
    for copied in COPIED:
        if (ROOT / copied).is_dir():
            ignored = shutil.ignore_patterns("__pycache__", "_C*")
            shutil.copytree(ROOT / copied, root / copied, ignore=ignored, dirs_exist_ok=True)
        else:
            shutil.copy(ROOT / copied, root / copied)
    for copied in FILES:
        shutil.copy(ROOT / copied, root / copied)
    here = Path.cwd()
    os.chdir(root)
    (extension,) = run_setup("setup.py", stop_after="init").ext_modules
    os.chdir(here)
    # Lines in reports, and a level that keeps what is written in the source.
    flags = [flag for flag in extension.extra_compile_args if flag not in ("-O3", "-g0")] + ["-O1", "-g1"]
    flags += ["-std=c++17", "-fPIC", "-fno-omit-frame-pointer", *part.flags]
    flags += [f"-I{path}" for path in (*extension.include_dirs, sysconfig.get_paths()["include"])]
    headers = max(path.stat().st_mtime for path in (root / "csrc").rglob("*.h"))
    (root / "objects").mkdir(exist_ok=True)
    objects = []
    for source in (*extension.sources, *(f"tests/sanitizers/{file}" for file in part.sources)):
        target = root / "objects" / f"{Path(source).stem}.o"
        objects.append(str(target))
        newest = max(headers, (root / source).stat().st_mtime)
        if not target.exists() or target.stat().st_mtime < newest:
            subprocess.run([compiler(), "-c", source, "-o", str(target), *flags], cwd=root, check=True)
    library = root / "atp_kernels" / f"_C{sysconfig.get_config_var('EXT_SUFFIX')}"
    found = [word for path in extension.library_dirs for word in (f"-L{path}", f"-Wl,-rpath,{path}")]
    libraries = [*found, *(f"-l{name}" for name in extension.libraries), "-pthread"]
    command = [compiler(), "-shared", "-o", str(library), *objects, *libraries, *part.flags]
    subprocess.run(command, cwd=root, check=True)
    return root


def run(name: str, root: Path, arguments: list[str], isa: str | None = None) -> subprocess.CompletedProcess[str]:
    """Python under the part's sanitizer, in its copy of the tree; what it says goes to the terminal and is returned."""
    part = PARTS[name]
    files = [
        subprocess.run([compiler(), f"-print-file-name={file}"], capture_output=True, text=True, check=True).stdout
        for file in part.preloaded
    ]
    environment = {**os.environ, **part.settings, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(root)}
    environment |= {"LD_PRELOAD": " ".join(file.strip() for file in files), "PYTHONDONTWRITEBYTECODE": "1"}
    if isa:
        environment["ATP_KERNELS_ISA"] = isa
    # Without address randomization: ThreadSanitizer of GCC 12 and 13 knows only the memory layouts of older kernels.
    fixed = ["setarch", "-R"] if name == "thread" and shutil.which("setarch") else []
    return subprocess.run(
        [*fixed, sys.executable, *arguments], cwd=root, env=environment, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip


def check_faults(name: str, root: Path) -> None:
    """Ends the program unless the sanitizer reports each fault that was made on purpose."""
    for call, report in PARTS[name].faults.items():
        function, argument = call.removesuffix(")").split("(")
        (library,) = (root / "atp_kernels").glob("_C*.so")
        code = (
            f"import ctypes, torch; f = ctypes.CDLL({str(library)!r}).{function}\n"
            f"f.argtypes, f.restype = [ctypes.c_int64], ctypes.c_int64\nf({argument})"
        )
        done = run(name, root, ["-c", code])
        if done.returncode == 0 or report not in done.stdout:
            print(done.stdout[-3000:])
            sys.exit(f"the {name} build does not report {call} as {report!r}: nothing would be checked")
        print(f"{name}: reports {call}, made on purpose, as {report}", flush=True)


def isas() -> list[str]:
    """Instruction sets that this processor runs, as far as Linux says."""
    known = set(Path("/proc/cpuinfo").read_text(encoding="utf-8").split())
    needed = {"avx2": ("avx2",), "avx512": ("avx512f", "avx512bw", "avx512dq", "avx512vl")}
    return [isa for isa in ISAS if known.issuperset(needed.get(isa, ()))]


def sanitize(name: str, calls: int) -> bool:
    """One part: whether nothing was reported."""
    started = time.monotonic()
    root = build(name)
    print(f"{name}: built in {time.monotonic() - started:.0f} s", flush=True)
    check_faults(name, root)
    todo = []
    if name == "address":
        tests = [f"tests/atp_kernels/{file}" for file in TESTS]
        todo.append((["-m", "pytest", "-q", "-n0", "-p", "no:cacheprovider", "-p", "no:faulthandler", *tests], None))
    threads = ["--threads", "2"] if name == "thread" else []
    # A race is one with any instruction set, and each call starts many threads: the best set alone is run.
    sets = isas()[-1:] if name == "thread" else isas()
    todo += [(["tests/fuzz_native.py", "--calls", str(calls), *threads], isa) for isa in sets]
    clean = True
    for arguments, isa in todo:
        started = time.monotonic()
        done = run(name, root, arguments, isa)
        lines = done.stdout.strip().splitlines() or ["no output"]
        print(*lines[-1 if done.returncode == 0 else -120 :], sep="\n")
        told = f"{name}: {' '.join(arguments[:2])} {isa or ''}"
        print(f"{told} ended with {done.returncode} in {time.monotonic() - started:.0f} s", flush=True)
        clean = clean and done.returncode == 0
    return clean


def main(check: Callable[[str, int], bool], calls: int, told: str) -> None:
    """Runs the parts that the command line names; `calls` of what is `told` are the default."""
    parser = argparse.ArgumentParser(description=sys.modules["__main__"].__doc__.splitlines()[0])
    parser.add_argument("parts", nargs="*", help=f"some of {', '.join(PARTS)}; default: all")
    parser.add_argument("--calls", type=int, default=calls, help=told)
    options = parser.parse_args()
    if unknown := set(options.parts) - PARTS.keys():
        parser.error(f"there is no part {', '.join(sorted(unknown))}: use {', '.join(PARTS)}")
    sys.exit(not all([check(name, options.calls) for name in options.parts or PARTS]))


if __name__ == "__main__":
    main(sanitize, 20_000, "fuzzed calls per instruction set")
