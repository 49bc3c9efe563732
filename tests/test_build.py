"""Packaging as a user meets it: sdist, wheel with the extension, and installs that go without it."""

import importlib.util
import platform
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
from wheels import ROOT, copy_source, files_of, fresh_environment, pip_wheel, run, search_path, use

pytestmark = pytest.mark.slow

has_compiler = pytest.mark.skipif(shutil.which("c++") is None, reason="needs a C++ compiler")
needs_auditwheel = pytest.mark.skipif(
    sys.platform == "linux" and not importlib.util.find_spec("auditwheel"), reason="needs auditwheel and patchelf"
)
needs_nvcc = pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc")


@pytest.fixture
def source(tmp_path):
    return copy_source(tmp_path / "source")


REPORT = "import atp_kernels; from atp_kernels import extension; print(atp_kernels.__file__, extension.REASON)"
NATIVE = """
import torch
print(extension.build_info())
torch.manual_seed(0)
parts = [torch.randn(size) for size in ((5, 24), (16, 24), (4, 24), (16, 4))]
ours, exact = (
    atp_kernels.masked_lora_linear(*operands, scaling=0.5, out_mask=torch.arange(16) > 3, backend=backend)
    for operands, backend in ((parts, "native"), ([part.double() for part in parts], "reference"))
)
torch.testing.assert_close(ours.double(), exact, rtol=1e-5, atol=1e-4)
"""


@has_compiler
@needs_auditwheel
def test_sdist_builds_a_wheel_whose_extension_runs(source, tmp_path):
    build = "import sys; from setuptools import build_meta; build_meta.build_sdist(sys.argv[1])"
    made = run([sys.executable, "-c", build, str(tmp_path)], source)
    assert made.returncode == 0, made.stderr
    (sdist,) = tmp_path.glob("atp_kernels-*.tar.gz")
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    folders = ("benchmarks", "csrc", "docs", "examples", "experiments", "tools")
    shipped = {str(path.relative_to(ROOT)) for name in folders for path in (ROOT / name).rglob("*") if path.is_file()}
    shipped = {name for name in shipped if "__pycache__" not in name}
    assert shipped <= names and not any(name.endswith((".so", ".pyc")) for name in names)

    script = [sys.executable, str(source / "tools" / "build_wheel.py"), "--source", str(sdist), "--out", str(tmp_path)]
    made = run(script, tmp_path)
    assert made.returncode == 0, made.stderr
    (wheel,) = tmp_path.glob("*.whl")
    assert "-linux_" not in wheel.name and not [name for name in files_of(wheel) if ".libs/" in name]
    assert [name for name in files_of(wheel) if re.match(r"atp_kernels/_C\..*\.so$", name)]
    assert not [name for name in files_of(wheel) if name.startswith(("csrc", "docs", "examples", "tests"))]
    used = run([str(fresh_environment(wheel, tmp_path / "venv")), "-c", REPORT + NATIVE], tmp_path)
    assert used.returncode == 0, used.stderr
    assert str(tmp_path / "venv") in used.stdout and " None\n" in used.stdout and "stable_abi_target" in used.stdout


@pytest.mark.parametrize(
    ("variables", "reason"),
    [
        ({"ATP_BUILD": "0"}, "ATP_BUILD=0 says so"),
        ({"CC": "/nonexistent", "CXX": "/nonexistent"}, "no C++ compiler named '/nonexistent'"),
    ],
)
def test_install_without_extension_is_pure_and_says_why_once(source, tmp_path, variables, reason):
    wheel, status, said = pip_wheel(source, tmp_path / "wheels", **variables)
    assert status == 0, said
    assert wheel.name.endswith("-py3-none-any.whl")
    assert not [name for name in files_of(wheel) if name.endswith(".so")]
    messages = {line.strip() for line in said.splitlines() if "installing without the extension" in line}
    assert len(messages) == 1 and reason in messages.pop()
    used = use(wheel, tmp_path / "site", REPORT)
    assert used.returncode == 0, used.stderr
    assert "was not built" in used.stdout and "ATP_BUILD=1" in used.stdout and reason in used.stdout


@has_compiler
def test_failed_compile_installs_unless_forced(source, tmp_path):
    (source / "csrc" / "cpu" / "compact.cpp").write_text("#error deliberately broken\n")
    wheel, status, said = pip_wheel(source, tmp_path / "wheels", MAX_JOBS="1")
    assert status == 0 and not [name for name in files_of(wheel) if name.endswith(".so")], said
    assert "the compiler failed" in said and "deliberately broken" in said
    wheel, status, said = pip_wheel(source, tmp_path / "forced", ATP_BUILD="1", MAX_JOBS="1")
    assert status != 0 and wheel is None and "cannot be built" in said


@pytest.mark.parametrize("variable", ["ATP_BUILD", "ATP_BUILD_CUDA"])
def test_a_switch_that_is_neither_0_nor_1_is_refused(source, variable):
    result = run([sys.executable, "setup.py", "--version"], source, **{variable: "yes"})
    assert result.returncode != 0 and f"{variable}='yes': use 0 or 1" in result.stderr


def test_wheel_holds_the_command_the_licence_and_one_version(source, tmp_path):
    import atp_kernels._version

    wheel, status, said = pip_wheel(source, tmp_path / "wheels", ATP_BUILD="0")
    assert status == 0, said
    assert wheel.name.startswith(f"atp_kernels-{atp_kernels._version.__version__}-")
    with zipfile.ZipFile(wheel) as archive:
        texts = {Path(name).name: archive.read(name).decode() for name in archive.namelist() if ".dist-info/" in name}
    assert "atp = atp.__main__:main" in texts["entry_points.txt"]
    needed = re.findall(r"^Requires-Dist: ([\w-]+)(?!.*extra)", texts["METADATA"], re.MULTILINE)
    assert needed == ["numpy", "torch", "triton"]
    assert "License-Expression: Apache-2.0" in texts["METADATA"] and "Apache License" in texts["LICENSE"]
    kept = [p for p in (ROOT / "atp").rglob("*") if p.suffix in (".html", ".jinja", ".yaml", ".css", ".js")]
    assert {str(path.relative_to(ROOT)) for path in kept} <= set(files_of(wheel))
    assert "atp_kernels/kept/bench.py" in files_of(wheel) and "atp_kernels/kept/mutants.py" not in files_of(wheel)


@pytest.mark.parametrize("in_place", [False, True])
def test_examples_and_experiments_are_found_away_from_the_clone(source, tmp_path, in_place):
    code = (
        "from atp.config import ATPConfig, shipped\nfrom atp.studies.experiments.spec import ExperimentSpec\n"
        "spec, path = ExperimentSpec.load('stages'); spec.config(path, 'health-mini', [])\n"
        "recipe = ATPConfig.load('examples/custom.yaml', ['model.path=m']).data.recipe\n"
        "print(path, recipe, *shipped.names('experiments'))"
    )
    (tmp_path / "elsewhere").mkdir()
    if in_place:
        used = run([sys.executable, "-S", "-c", code], tmp_path / "elsewhere", PYTHONPATH=search_path(source))
    else:
        wheel, status, said = pip_wheel(source, tmp_path / "wheels", ATP_BUILD="0")
        assert status == 0, said
        used = use(wheel, tmp_path / "site", code)
    assert used.returncode == 0, used.stderr
    path, recipe, *names = used.stdout.split()
    assert path == str((source if in_place else tmp_path / "site" / "atp" / "_shipped") / "experiments" / "stages.yaml")
    assert recipe == "custom" and names == sorted(file.stem for file in (ROOT / "experiments").glob("*.yaml"))


@pytest.fixture
def listed():
    from atp_kernels import extension

    if not extension.AVAILABLE:
        pytest.skip(extension.REASON)
    import atp_kernels._C as library

    return lambda *command: run([*command, library.__file__], ROOT).stdout


@pytest.mark.skipif(shutil.which("nm") is None, reason="needs nm")
def test_extension_uses_only_the_stable_abi_of_torch(listed):
    symbols = [line.split()[-1] for line in listed("nm", "--dynamic", "--undefined-only").splitlines()]
    assert [s for s in symbols if s.startswith(("aoti_torch_", "torch_"))]
    assert not [s for s in symbols if re.match(r"_ZNK?(2at|3c10|5torch)", s)]


@pytest.mark.skipif(
    platform.machine() != "x86_64" or shutil.which("objdump") is None, reason="needs x86-64 and objdump"
)
def test_no_code_of_an_instruction_set_runs_before_the_set_is_picked(listed):
    """An import called AVX-512 once, which ended Python on every processor without it."""
    code_of_all = listed("objdump", "-d", "--no-show-raw-insn")
    room = re.compile(r"3atp3cpu(4avx2|6avx512)")  # as C++ mangles atp::cpu::avx2
    wide = 0
    for name, code in re.findall(r"^[0-9a-f]+ <(.+)>:\n((?:.+\n)*)", code_of_all, re.MULTILINE):
        if room.search(name) and not name.startswith("_GLOBAL__"):  # which runs at import
            wide += "%zmm" in code
            continue
        assert "%ymm" not in code and "%zmm" not in code, f"{name} runs on every processor"
        called = [line for line in code.splitlines() if "<" in line and room.search(line.split("<")[1])]
        assert not [line for line in called if "call" in line or "jmp" in line], f"{name} calls one set by its name"
    assert wide


CUDA_ARCHS = ("80", "90", "100", "120")


def compile_cuda(source, target, *options):
    """Compile for every generation that this nvcc knows: (architectures, what it said about each kernel)."""
    from torch.utils.cpp_extension import include_paths

    known = subprocess.run(["nvcc", "--list-gpu-code"], capture_output=True, text=True, check=True).stdout.split()
    archs = [arch for arch in CUDA_ARCHS if f"sm_{arch}" in known]
    command = ["nvcc", "-c", str(source), "-o", str(target), "-std=c++17", "--threads=2", "--resource-usage"]
    command += ["-DTORCH_TARGET_VERSION=0x020a000000000000ULL", *options]
    command += [f"-I{path}" for path in include_paths()]
    command += [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in archs]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return archs, result.stderr


def resource_usage(said):
    """(kernel, architecture, bytes of spill stores and loads) of every kernel that nvcc reports."""
    entry = r"entry function '(\w+)' for '(sm_\w+)'(?:(?!entry function)[\s\S])*?"
    spills = r"(\d+) bytes spill stores, (\d+) bytes spill loads"
    return [(name, arch, int(stores) + int(loads)) for name, arch, stores, loads in re.findall(entry + spills, said)]


@needs_nvcc
@pytest.mark.parametrize("name", sorted(path.name for path in (ROOT / "csrc" / "cuda").glob("*.cu")))
def test_cuda_source_compiles_for_every_architecture_without_spills(name, tmp_path):
    source, target = ROOT / "csrc" / "cuda" / name, tmp_path / "object.o"
    archs, said = compile_cuda(source, target)
    usage = resource_usage(said)
    assert {"80", "90"} <= set(archs) and {arch for _, arch, _ in usage} == {f"sm_{arch}" for arch in archs}
    kernels = re.findall(r"__global__ void (\w+)\(", source.read_text(encoding="utf-8"))
    assert kernels and all(any(kernel in mangled for mangled, _, _ in usage) for kernel in kernels)
    assert [report for report in usage if report[2]] == []
    assert target.stat().st_size > 0
