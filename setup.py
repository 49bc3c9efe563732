"""Builds the optional extension atp_kernels._C; everything else about the package is in pyproject.toml.

    ATP_BUILD=0          skip the extension            ATP_BUILD=1        fail the install if it does not build
    ATP_BUILD_CUDA=0|1   leave out | insist on CUDA    TORCH_CUDA_ARCH_LIST="8.0;9.0a;10.0a"

Without torch, or without a compiler, at build time the package installs as pure Python and says so once.
"""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.errors import BaseError, CCompilerError

SOURCE = Path("csrc")
OLDEST_TORCH = (2, 10)
DEFAULT_CUDA_ARCHS = "8.0;9.0a;10.0a"
# No contraction: results are then the same on every instruction set. No errno: a square root is one instruction.
# -Wno-psabi: vectors are always inlined.
CXX_FLAGS = ["-O3", "-g0", "-ffp-contract=off", "-fno-math-errno", "-fvisibility=hidden", "-Wno-psabi"]
REMEDY = (
    "To build it, install torch>=2.10 and a C++17 compiler and repeat the install with "
    "`ATP_BUILD=1 pip install --no-build-isolation -v`, which shows every error"
)


def forced(variable: str) -> bool | None:
    """What the user says in an environment variable: "1" True, "0" False, unset None."""
    value = os.environ.get(variable, "")
    if value not in ("", "0", "1"):
        raise SystemExit(f"{variable}={value!r}: use 0 or 1, or leave it unset.")
    return {"": None, "0": False, "1": True}[value]


def go_without(reason: str) -> None:
    """Fall back to pure Python with one message, or stop where ATP_BUILD=1 insists."""
    if forced("ATP_BUILD"):
        raise SystemExit(f"atp-kernels: ATP_BUILD=1, but atp_kernels._C cannot be built: {reason}.")
    message = f"atp-kernels: installing without the extension atp_kernels._C, since {reason}."
    print(f"{message} Everything works, some of it slower. {REMEDY}.", file=sys.stderr)


def obstacle() -> str | None:
    """The reason that the extension cannot be built here, or None."""
    if forced("ATP_BUILD") is False:
        return "ATP_BUILD=0 says so"
    try:
        import torch
    except ImportError as error:
        return f"torch is missing at build time ({error})"
    if tuple(int(part) for part in torch.__version__.split(".")[:2]) < OLDEST_TORCH:
        return f"torch {torch.__version__} is older than 2.10, whose stable ABI it needs"
    compiler = os.environ.get("CXX", "c++")  # the name that torch's builder calls
    if shutil.which(compiler.split()[0]) is None:
        return f"there is no C++ compiler named {compiler!r}"
    return None


def cuda_archs() -> list[str]:
    """Architectures to compile CUDA code for; none where CUDA is left out."""
    import torch

    wanted = forced("ATP_BUILD_CUDA")
    nvcc = shutil.which("nvcc")
    if wanted and nvcc is None:
        raise SystemExit("ATP_BUILD_CUDA=1 needs nvcc: put the CUDA toolkit's bin folder on PATH.")
    if nvcc is None or not (torch.version.cuda if wanted is None else wanted):
        return []
    return (os.environ.get("TORCH_CUDA_ARCH_LIST") or DEFAULT_CUDA_ARCHS).replace(";", " ").split()


def gencode(arch: str) -> list[str]:
    """nvcc flags of one entry of TORCH_CUDA_ARCH_LIST, such as 9.0a or 8.0+PTX."""
    number = arch.removesuffix("+PTX").replace(".", "")
    codes = [f"sm_{number}", *([f"compute_{number}"] if arch.endswith("+PTX") else [])]
    return [f"-gencode=arch=compute_{number},code={code}" for code in codes]


def target_version() -> str:
    """Build against the stable ABI of the oldest supported torch, so that one binary runs under every later one."""
    major, minor = OLDEST_TORCH
    return f"-DTORCH_TARGET_VERSION=0x{major:02x}{minor:02x}000000000000ULL"


def cuda_libraries() -> list[str]:
    """The toolkit's library folders, asked from nvcc itself: the one on PATH may be a link or a script."""
    dry = subprocess.run(["nvcc", "--dryrun", "-x", "cu", os.devnull], capture_output=True, text=True, check=True)
    top = Path(re.search(r"TOP=(.+)", dry.stderr).group(1).strip()).resolve()
    return [str(path) for name in ("lib64", "lib", "targets/*/lib") for path in top.glob(name)]


def compile_cuda(extension: Extension, archs: list[str], folder: Path) -> None:
    """Add csrc/cuda to the extension as objects.

    nvcc is called here since torch's own builder needs a CUDA build of torch, which the stable ABI does not.
    """
    extension.library_dirs += cuda_libraries()
    extension.libraries += ["cudart_static", "rt", "dl", "pthread"]
    flags = ["-O3", "-std=c++17", "-Xcompiler=-fPIC", target_version()]
    flags += [f"-I{path}" for path in extension.include_dirs] + [flag for arch in archs for flag in gencode(arch)]
    folder.mkdir(parents=True, exist_ok=True)
    for source in sorted((SOURCE / "cuda").glob("*.cu")):
        target = folder / f"{source.stem}.cuda.o"
        subprocess.run(["nvcc", "-c", str(source), "-o", str(target), *flags], check=True)
        extension.extra_objects.append(str(target))


def pybind11_include() -> list[str]:
    """The headers of the pybind11 package; where it is missing, torch's include folder has a copy."""
    try:
        import pybind11
    except ImportError:
        return []
    return [pybind11.get_include()]


def describe_extension(archs: list[str]) -> Extension:
    from torch.utils import cpp_extension

    return Extension(
        "atp_kernels._C",
        sources=[str(path) for path in sorted([SOURCE / "module.cpp", *SOURCE.glob("cpu/*.cpp")])],
        include_dirs=[*pybind11_include(), *cpp_extension.include_paths()],
        library_dirs=cpp_extension.library_paths(),
        libraries=["torch_cpu"],
        define_macros=[("ATP_CUDA_ARCHS", f'"{" ".join(archs)}"')],
        extra_compile_args=[*CXX_FLAGS, target_version()],
        language="c++",
    )


def build_command(archs: list[str]) -> type:
    from torch.utils.cpp_extension import BuildExtension

    class BuildOrGoWithout(BuildExtension):
        """torch's builder, with the CUDA objects added, whose failure leaves a working pure-Python package."""

        def build_extensions(self) -> None:
            try:
                if archs:
                    compile_cuda(self.extensions[0], archs, Path(self.build_temp))
                super().build_extensions()
            except (OSError, RuntimeError, subprocess.CalledProcessError, BaseError, CCompilerError) as error:
                remedy = "; ATP_BUILD_CUDA=0 leaves CUDA out" if archs else ""
                go_without(f"the compiler failed ({error}){remedy}")
                self.extensions = []

    return BuildOrGoWithout


def main() -> None:
    reason = obstacle()
    if reason is not None:
        go_without(reason)
        setup()
        return
    archs = cuda_archs()
    setup(ext_modules=[describe_extension(archs)], cmdclass={"build_ext": build_command(archs)})


main()
