"""What setup.py does where the toolkit, the compiler, torch or setuptools are not what it would like."""

import os
import pty
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig

import pytest
from wheels import copy_source, files_of, pip_wheel, run

pytestmark = [pytest.mark.slow, pytest.mark.skipif(shutil.which("c++") is None, reason="needs a C++ compiler")]

# Says what it was compiled for, and compiles in no time: pybind11 would take seconds.
MODULE = """
#include <Python.h>
#ifndef ATP_CUDA_ARCHS
#define ATP_CUDA_ARCHS ""
#endif
static PyModuleDef definition = {PyModuleDef_HEAD_INIT, "_C"};
PyMODINIT_FUNC PyInit__C() {
  PyObject* module = PyModule_Create(&definition);
  PyModule_AddStringConstant(module, "archs", ATP_CUDA_ARCHS);
  return module;
}
"""
NVCC = """#!/bin/sh
echo "$@" >> {log}
case "$*" in
  *--list-gpu-code*) echo {known}; exit 0 ;;
  *--dryrun*) echo '#$ TOP={toolkit}'; exit 0 ;;
esac
{compile}
while [ "$1" != -o ]; do shift; done
exec c++ -fPIC -c -x c++ /dev/null -o "$2"
"""
# torch's build decides whether CUDA is tried; the one of the tests may be for CPUs.
SETUP = """
import runpy, sys, torch
torch.version.cuda = "13.0"
sys.argv = ["setup.py", *sys.argv[1:]]
runpy.run_path("setup.py", run_name="__main__")
"""


@pytest.fixture
def source(tmp_path):
    target = copy_source(tmp_path / "source")
    for file in (target / "csrc" / "cpu").glob("*.cpp"):
        file.unlink()
    (target / "csrc" / "module.cpp").write_text(MODULE)
    return target


@pytest.fixture
def build(source, tmp_path):
    """Builds the extension in place beside an nvcc that the test describes: (what it was built for, what was said)."""

    def call(known="sm_80 sm_90 sm_100 sm_120", compile="", libraries=True, **variables):
        toolkit = tmp_path / "toolkit"
        (toolkit / "bin").mkdir(parents=True)
        (toolkit / "lib64").mkdir()
        if libraries:
            subprocess.run(["ar", "rc", str(toolkit / "lib64" / "libcudart_static.a")], check=True)
        script = toolkit / "bin" / "nvcc"
        script.write_text(NVCC.format(log=tmp_path / "log", known=known, toolkit=toolkit, compile=compile))
        script.chmod(0o755)
        path = os.pathsep.join([str(script.parent), os.environ["PATH"]])
        done = run([sys.executable, "-c", SETUP, "build_ext", "--inplace"], source, PATH=path, **variables)
        (binary,) = (source / "atp_kernels").glob("_C*.so") if done.returncode == 0 else (None,)
        said = [line for line in done.stderr.splitlines() if line.startswith("atp-kernels")]
        return (binary and archs_of(binary)), said

    return call


def archs_of(binary):
    """Asked in a process of its own: Python keeps one module a name."""
    code = (
        "import sys; from importlib import machinery, util; loader = machinery.ExtensionFileLoader('_C', sys.argv[1]); "
        "module = util.module_from_spec(util.spec_from_loader('_C', loader)); loader.exec_module(module); "
        "print(module.archs)"
    )
    done = run([sys.executable, "-c", code, str(binary)], binary.parent)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_by_default_the_extension_is_for_three_generations_and_the_next(build, tmp_path):
    archs, said = build()
    assert archs == "8.0 9.0 10.0+PTX" and said == []
    compiled = [line for line in (tmp_path / "log").read_text().splitlines() if "-gencode" in line]
    assert len(compiled) == 2
    for code in ("80,code=sm_80", "90,code=sm_90", "100,code=sm_100", "100,code=compute_100"):
        assert all(f"-gencode=arch=compute_{code}" in line for line in compiled)


@pytest.mark.parametrize(
    ("nvcc", "reason"),
    [
        ({"compile": "echo gcc.h:7: error: GNU 19 is not supported; exit 1"}, "error: GNU 19 is not supported"),
        ({"libraries": False}, "cudart_static|failed with exit code|command .*failed"),
        ({"known": "sm_50 sm_52"}, "this nvcc does not know 8.0, 9.0, 10.0.PTX"),
        ({"known": "x; exit 1"}, "nvcc failed with 'x'"),
    ],
    ids=["compile", "link", "old", "broken"],
)
def test_cuda_that_does_not_build_leaves_the_extension_for_cpus(build, nvcc, reason):
    archs, said = build(**nvcc)
    assert archs == ""
    (sentence,) = said
    assert "for CPUs alone" in sentence and re.search(reason, sentence)


def test_cuda_that_does_not_build_is_an_error_where_it_was_asked_for(build):
    archs, (sentence,) = build(compile="echo 'fatal error: no'; exit 1", ATP_BUILD_CUDA="1")
    assert archs is None and "ATP_BUILD_CUDA=1" in sentence and "fatal error: no" in sentence


def test_a_generation_that_nvcc_does_not_know_is_left_out_and_its_ptx_kept(build):
    archs, (sentence,) = build(known="sm_80 sm_86 sm_90")
    assert archs == "8.0 9.0+PTX"
    assert "for 8.0, 9.0+PTX" in sentence and "does not know 10.0+PTX" in sentence


def test_install_says_on_the_terminal_what_pip_keeps_to_itself(source, tmp_path):
    def on_terminal(**variables):
        out = tmp_path / f"wheels{len(list(tmp_path.iterdir()))}"
        words = [sys.executable, "-m", "pip", "wheel", str(source), "--no-build-isolation", "--no-deps", "-w", str(out)]
        command = shlex.join(["env", "CXX=/nonexistent", *(f"{k}={v}" for k, v in variables.items()), *words])
        shown = bytearray()

        def read(terminal):
            shown.extend(data := os.read(terminal, 4096))
            return data

        assert pty.spawn(["/bin/sh", "-c", f"cd {tmp_path}; {command} > {out}.log 2>&1"], read, lambda _: b"") == 0
        return shown.decode(), (tmp_path / f"{out.name}.log").read_text()

    shown, log = on_terminal()
    assert shown.count("without the extension") == 1 and "there is no C++ compiler named '/nonexistent'" in shown
    assert "without the extension" not in log
    shown, log = on_terminal(ATP_BUILD="0")
    assert "extension" not in shown


def test_binary_of_an_earlier_build_does_not_slip_into_a_package_without_the_extension(source, tmp_path):
    left = source / "build" / f"lib.{sysconfig.get_platform()}-{sys.implementation.cache_tag}" / "atp_kernels"
    left.mkdir(parents=True)
    (left / f"_C{sysconfig.get_config_var('EXT_SUFFIX')}").write_text("stale")
    (source / "csrc" / "module.cpp").write_text("#error broken\n")
    wheel, status, said = pip_wheel(source, tmp_path / "wheels")
    assert status == 0, said
    assert [name for name in files_of(wheel) if "/_C" in name] == ["atp_kernels/_C.missing"]


def test_old_setuptools_is_refused_in_one_sentence(source):
    code = "import setuptools, sys; setuptools.__version__ = '65.5.0'; sys.argv = ['setup.py', 'egg_info']\n"
    done = run([sys.executable, "-c", code + "exec(open('setup.py').read())"], source)
    assert done.returncode == 1
    (sentence,) = done.stderr.strip().splitlines()
    assert "needs setuptools>=77" in sentence and "65.5.0" in sentence and "pip install --upgrade" in sentence
