"""Copies of the tree, and what pip and setup.py make of them."""

import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
SHIPPED = (
    *("atp", "atp_kernels", "benchmarks", "csrc", "docs", "examples", "experiments", "tools"),
    *("setup.py", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE"),
)
BUILD_VARIABLES = ("ATP_BUILD", "ATP_BUILD_CUDA", "TORCH_CUDA_ARCH_LIST", "CC", "CXX")


def copy_source(target):
    """A clean copy of the tree: no build folder and no binary of an earlier build."""
    target.mkdir()
    for name in SHIPPED:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, target / name, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
        elif (ROOT / name).exists():
            shutil.copy(ROOT / name, target)
    return target


def run(command, cwd, **variables):
    clean = {key: value for key, value in os.environ.items() if key not in (*BUILD_VARIABLES, "PYTHONPATH")}
    return subprocess.run(command, cwd=cwd, env={**clean, **variables}, capture_output=True, text=True)


def pip_wheel(what, out, **variables):
    """The wheel of a folder or an sdist, and all that pip and setup.py said."""
    options = ["-v", "--no-build-isolation", "--no-deps", "--no-cache-dir", "--wheel-dir", str(out)]
    result = run([sys.executable, "-m", "pip", "wheel", str(what), *options], out.parent, **variables)
    wheels = sorted(out.glob("*.whl"))
    return (wheels[0] if wheels else None), result.returncode, result.stdout + result.stderr


def files_of(wheel):
    with zipfile.ZipFile(wheel) as archive:
        return archive.namelist()


def search_path(folder):
    """PYTHONPATH with a folder first and no editable install in it, for python -S."""
    paths = dict.fromkeys([str(folder), sysconfig.get_path("purelib"), sysconfig.get_path("platlib")])
    return os.pathsep.join(paths)


def use(wheel, folder, code):
    """Run code with the wheel's contents as the only copy: -S keeps an editable install of this tree out of sight."""
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder)
    return run([sys.executable, "-S", "-c", code], folder, PYTHONPATH=search_path(folder))


def fresh_environment(wheel, folder):
    """The Python of a new virtual environment that holds the wheel, and torch from the one that runs the tests."""
    made = run([sys.executable, "-m", "venv", str(folder)], folder.parent)
    assert made.returncode == 0, made.stderr
    python = folder / "bin" / "python"
    installed = run([str(python), "-m", "pip", "install", "--no-index", "--no-deps", str(wheel)], folder.parent)
    assert installed.returncode == 0, installed.stderr
    (site,) = folder.glob("lib/python*/site-packages")
    # A folder that a .pth names comes last, and .pth files in it, such as that of an editable install, are not read.
    (site / "torch.pth").write_text(str(Path(importlib.util.find_spec("torch").origin).parents[1]))
    return python
