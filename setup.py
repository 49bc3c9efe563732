"""Builds the optional extension atp_kernels._C; everything else about the package is in pyproject.toml.

    ATP_BUILD=0          skip the extension            ATP_BUILD=1        fail the install if it does not build
    ATP_BUILD_CUDA=0|1   leave out | insist on CUDA    TORCH_CUDA_ARCH_LIST="8.0;9.0;10.0+PTX"

Without torch, or without a compiler, at build time the package installs as pure Python, and where the CUDA sources do
not build the extension is for CPUs alone. Either is said once, on the terminal too, and kept for `atp env`.
"""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import setuptools
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py
from setuptools.errors import BaseError, CCompilerError

SOURCE = Path("csrc")
OLDEST_SETUPTOOLS = 77  # the first that reads pyproject.toml's licence field
OLDEST_TORCH = (2, 10)
DEFAULT_CUDA_ARCHS = "8.0;9.0;10.0+PTX"
# No contraction: same results on every instruction set. No errno: a square root is one instruction.
# -Wno-psabi: vectors are always inlined.
CXX_FLAGS = ["-O3", "-g0", "-ffp-contract=off", "-fno-math-errno", "-fvisibility=hidden", "-Wno-psabi"]
FAILURES = (OSError, RuntimeError, subprocess.CalledProcessError, BaseError, CCompilerError)
REMEDY = (
    "To build it, install torch>=2.10 and a C++17 compiler and repeat the install with "
    "`ATP_BUILD=1 pip install --no-build-isolation -v`, which shows every error"
)
# Folders at the root of a clone, installed to atp/_shipped.
SHIPPED = ("examples", "experiments")


def forced(variable: str) -> bool | None:
    """The user's choice in an environment variable: "1" is True, "0" False, unset None."""
    value = os.environ.get(variable, "")
    if value not in ("", "0", "1"):
        raise SystemExit(f"{variable}={value!r}: use 0 or 1, or leave it unset.")
    return {"": None, "0": False, "1": True}[value]


def say(message: str) -> None:
    """Print a message, also on the terminal if pip captures the build's output."""
    print(f"atp-kernels: {message}", file=sys.stderr, flush=True)
    if sys.stderr.isatty() or forced("ATP_BUILD") is False:
        return
    try:
        with open("/dev/tty", "w", encoding="utf-8") as terminal:
            terminal.write(f"\natp-kernels: {message}\n")
    except OSError:
        pass  # no terminal


def go_without(reason: str, build_lib: str) -> None:
    """Fall back to pure Python with one message, and save the reason beside the package in build_lib.

    Raises SystemExit if ATP_BUILD=1 requires the extension.
    """
    if forced("ATP_BUILD"):
        raise SystemExit(f"atp-kernels: ATP_BUILD=1, but atp_kernels._C cannot be built: {reason}.")
    package = Path(build_lib, "atp_kernels")
    package.mkdir(parents=True, exist_ok=True)
    for stale in package.glob("_C.*"):  # from an earlier build in the same folder
        stale.unlink()
    (package / "_C.missing").write_text(reason, encoding="utf-8")
    say(
        f"installing without the extension atp_kernels._C, since {reason}. Everything works, some of it slower. "
        f"{REMEDY}; ATP_BUILD=0 skips it silently."
    )


def obstacle() -> str | None:
    """Why the extension cannot be built here, or None."""
    if forced("ATP_BUILD") is False:
        return "ATP_BUILD=0 says so"
    try:
        import torch
    except ImportError as error:
        return f"torch is missing at build time ({error}), as it always is under build isolation"
    if tuple(int(part) for part in torch.__version__.split(".")[:2]) < OLDEST_TORCH:
        return f"torch {torch.__version__} is older than 2.10, whose stable ABI it needs"
    compiler = os.environ.get("CXX", "c++")  # the name that torch's builder uses
    if shutil.which(compiler.split()[0]) is None:
        return f"there is no C++ compiler named {compiler!r}"
    return None


def cuda_archs() -> list[str]:
    """Architectures to compile CUDA code for, in the form of TORCH_CUDA_ARCH_LIST; none if CUDA is left out."""
    import torch

    wanted = forced("ATP_BUILD_CUDA")
    toolkit = shutil.which("nvcc")
    if wanted and toolkit is None:
        raise SystemExit("ATP_BUILD_CUDA=1 needs nvcc: put the CUDA toolkit's bin folder on PATH.")
    if toolkit is None or not (torch.version.cuda if wanted is None else wanted):
        return []
    return (os.environ.get("TORCH_CUDA_ARCH_LIST") or DEFAULT_CUDA_ARCHS).replace(";", " ").split()


def number(arch: str) -> str:
    """nvcc's number of an architecture: 100a for 10.0a+PTX."""
    return arch.removesuffix("+PTX").replace(".", "")


def gencode(arch: str) -> list[str]:
    """nvcc flags of one architecture, such as 9.0a or 8.0+PTX."""
    codes = [f"sm_{number(arch)}", *([f"compute_{number(arch)}"] if arch.endswith("+PTX") else [])]
    return [f"-gencode=arch=compute_{number(arch)},code={code}" for code in codes]


def nvcc(*options: str) -> str:
    """nvcc's output on both streams. Raises RuntimeError with its first error."""
    done = subprocess.run(["nvcc", *options], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode:
        print(done.stdout, file=sys.stderr)
        lines = [line.strip() for line in done.stdout.splitlines() if line.strip()]
        first = next((line for line in lines if "error" in line.lower()), lines[0] if lines else "no message")
        raise RuntimeError(f"nvcc failed with {first!r}")
    return done.stdout


def fitting(archs: list[str]) -> list[str]:
    """The architectures that this nvcc knows; PTX wanted for an unknown one comes from the newest."""
    known = set(re.findall(r"sm_(\d+)", nvcc("--list-gpu-code")))
    left_out = [arch for arch in archs if number(arch).rstrip("af") not in known]
    kept = [arch for arch in archs if arch not in left_out]
    if not kept:
        raise RuntimeError(f"this nvcc does not know {', '.join(left_out)}")
    if left_out:
        newest = max(range(len(kept)), key=lambda i: int(number(kept[i]).rstrip("af")))
        if any(arch.endswith("+PTX") for arch in left_out) and not kept[newest].endswith("+PTX"):
            kept[newest] += "+PTX"
        say(f"the CUDA code is for {', '.join(kept)}, since this nvcc does not know {', '.join(left_out)}.")
    return kept


def target_version() -> str:
    """Target the stable ABI of the oldest supported torch, so that one binary runs under every later one."""
    major, minor = OLDEST_TORCH
    return f"-DTORCH_TARGET_VERSION=0x{major:02x}{minor:02x}000000000000ULL"


def cuda_libraries() -> list[str]:
    """The toolkit's library folders, from nvcc itself, since the nvcc on PATH may be a link or a script."""
    top = re.search(r"TOP=(.+)", nvcc("--dryrun", "-x", "cu", os.devnull))
    if top is None:
        raise RuntimeError("nvcc --dryrun does not name the folder of its toolkit")
    root = Path(top.group(1).strip()).resolve()
    return [str(path) for name in ("lib64", "lib", "targets/*/lib") for path in root.glob(name)]


def with_cuda(extension: Extension, archs: list[str], folder: Path) -> None:
    """Add csrc/cuda to the extension as objects. Raises RuntimeError if nvcc fails.

    Calls nvcc directly: torch's builder needs a CUDA build of torch, which the stable ABI does not.
    """
    archs = fitting(archs)
    extension.library_dirs += cuda_libraries()
    extension.libraries += ["cudart_static", "rt", "dl", "pthread"]
    flags = ["-O3", "-std=c++17", "-Xcompiler=-fPIC", target_version()]
    flags += [f"-I{path}" for path in extension.include_dirs] + [flag for arch in archs for flag in gencode(arch)]
    folder.mkdir(parents=True, exist_ok=True)
    for source in sorted((SOURCE / "cuda").glob("*.cu")):
        target = folder / f"{source.stem}.cuda.o"
        nvcc("-c", str(source), "-o", str(target), *flags)
        extension.extra_objects.append(str(target))
    extension.define_macros.append(("ATP_CUDA_ARCHS", '"' + " ".join(archs) + '"'))


def pybind11_include() -> list[str]:
    """The headers of the pybind11 package; without it, torch's include folder has a copy."""
    try:
        import pybind11
    except ImportError:
        return []
    return [pybind11.get_include()]


def describe_extension() -> Extension:
    """The extension for CPUs."""
    from torch.utils import cpp_extension

    return Extension(
        "atp_kernels._C",
        sources=[str(path) for path in sorted([SOURCE / "module.cpp", *SOURCE.glob("cpu/*.cpp")])],
        include_dirs=[*pybind11_include(), *cpp_extension.include_paths()],
        library_dirs=cpp_extension.library_paths(),
        libraries=["torch_cpu"],
        extra_compile_args=[*CXX_FLAGS, target_version()],
        language="c++",
    )


def extension_builder(archs: list[str]) -> type[build_ext]:
    """The `build_ext` of a machine that can build the extension."""
    from torch.utils.cpp_extension import BuildExtension

    class BuildOrGoWithout(BuildExtension):
        """torch's builder: with CUDA objects, else CPU-only, else a pure Python package."""

        def build_extensions(self) -> None:
            if archs and self.build_with_cuda():
                return
            try:
                super().build_extensions()
            except FAILURES as error:
                go_without(f"the compiler failed ({error})", self.build_lib)
                self.extensions = []

        def build_with_cuda(self) -> bool:
            (extension,) = self.extensions
            plain = {name: list(value) for name, value in vars(extension).items() if isinstance(value, list)}
            try:
                with_cuda(extension, archs, Path(self.build_temp))
                super().build_extensions()
                return True
            except FAILURES as error:
                if forced("ATP_BUILD_CUDA"):
                    raise SystemExit(f"atp-kernels: ATP_BUILD_CUDA=1, but CUDA does not build: {error}.") from None
                say(
                    f"building the extension for CPUs alone, since with CUDA it does not build ({error}). "
                    "ATP_BUILD_CUDA=1 makes this an error, ATP_BUILD_CUDA=0 leaves CUDA out."
                )
                vars(extension).update(plain)
                return False

    return BuildOrGoWithout


def build_python(reason: str | None) -> type[build_py]:
    """The `build_py` that adds files from outside the packages. reason: why there is no extension, or None."""

    class BuildPython(build_py):
        def find_package_modules(self, package: str, package_dir: str) -> list[tuple[str, str, str]]:
            """All but the broken lines that only the tests of a clone read."""
            return [module for module in super().find_package_modules(package, package_dir) if module[1] != "mutants"]

        def run(self) -> None:
            super().run()
            for folder in () if self.editable_mode else SHIPPED:
                target = Path(self.build_lib, "atp", "_shipped", folder)
                target.mkdir(parents=True, exist_ok=True)
                for file in Path(folder).glob("*.yaml"):
                    self.copy_file(str(file), str(target / file.name))
            if reason is not None:
                go_without(reason, self.build_lib)

    return BuildPython


def without_extension(reason: str) -> type[build_ext]:
    """The `build_ext` of a machine that cannot build the extension: says why when called explicitly."""

    class GoWithout(build_ext):
        def run(self) -> None:
            go_without(reason, self.build_lib)

    return GoWithout


def main() -> None:
    if int(setuptools.__version__.split(".")[0]) < OLDEST_SETUPTOOLS:
        raise SystemExit(
            f"atp-kernels needs setuptools>={OLDEST_SETUPTOOLS} to be built and this one is {setuptools.__version__}: "
            f'run pip install --upgrade "setuptools>={OLDEST_SETUPTOOLS}" wheel, then repeat the install.'
        )
    reason = obstacle()
    archs = cuda_archs() if reason is None else []
    setup(
        ext_modules=[describe_extension()] if reason is None else [],
        cmdclass={
            "build_py": build_python(reason),
            "build_ext": extension_builder(archs) if reason is None else without_extension(reason),
        },
    )


main()
