"""The script for a machine with a GPU: its shell logic, on a CPU."""

import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
import torch

from atp_kernels.call import OPERATIONS
from atp_kernels.tuning.table import REGIMES
from benchmarks.records import append

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "benchmarks" / "gpu_check.sh"
MARKS = ["tune", "tune_steps", "ops", "train", "tuned", "whole"]
STAGES = ["selftest", "build", "sanitize", "instrument", "test", "method", *MARKS]


def gpu_check(out, *arguments, **variables):
    environment = {**os.environ, "OUT": str(out), "PYTHON": sys.executable, **variables}
    return subprocess.run(["bash", str(SCRIPT), *arguments], env=environment, capture_output=True, text=True)


def test_what_cannot_be_run_is_one_sentence(tmp_path):
    result = gpu_check(tmp_path / "out", "biuld")
    assert result.returncode == 2 and not (tmp_path / "out").exists()
    assert f"unknown stage 'biuld': use some of {' '.join(STAGES)}, or --dry" in result.stderr
    if not torch.cuda.is_available():
        result = gpu_check(tmp_path, "build")
        assert result.returncode == 1 and "torch sees no GPU here; --dry runs the stages on the CPU" in result.stderr


def test_all_tests_that_it_runs_exist():
    """pytest gives up before the first test where one of its paths does not exist."""
    paths = re.findall(r"\b(?:tests|method)=\(([^)]*)\)", SCRIPT.read_text())
    assert len(paths) == 4
    listed = subprocess.run(["bash", "-c", f"ls -d {' '.join(paths)}"], cwd=ROOT, capture_output=True, text=True)
    assert listed.returncode == 0, listed.stderr


def test_what_is_wrong_shows_first_and_every_stage_fits_ten_minutes():
    text = SCRIPT.read_text()
    (stages,) = re.findall(r"^STAGES=\((.*)\)$", text, re.MULTILINE)
    assert stages.split() == STAGES
    assert sorted(re.findall(r"^run_(\w+)\(\)", text, re.MULTILINE)) == sorted(STAGES)
    (seconds,) = re.findall(r"STAGE_SECONDS:-(\d+)", text)
    assert int(seconds) < 590 and 'timeout "$STAGE_SECONDS" bash benchmarks/gpu_check.sh' in text
    tools = re.findall(r"\$SANITIZER (\w+)", text)
    assert tools == ["memcheck", "racecheck", "initcheck"] and "TRITON_INSTRUMENTATION_MODE=consan" in text
    assert text.count("$((STAGE_SECONDS / 2))") == 1 and text.count("  sanitized ") == 2


@pytest.mark.slow
def test_the_self_test_and_tuning_are_stages(tmp_path):
    result = gpu_check(tmp_path, "--dry", "selftest", "tune")
    assert result.returncode == 0, result.stdout + result.stderr
    log = (tmp_path / "selftest.log").read_text()
    assert f"{len(OPERATIONS)} of {len(OPERATIONS)} operations are right on cpu" in log
    (table,) = (tmp_path / "tables").glob("cpu-*.json")
    regimes = {entry["key"]["regime"] for entry in json.loads(table.read_text())["entries"]}
    assert regimes == set(REGIMES)
    assert {path.parent.name for path in tmp_path.rglob("*.json")} == {"untuned", "tables"}


def test_sanitizers_run_what_they_are_given_in_half_a_stage_each(tmp_path):
    """A stand-in for Python ends at once, on a machine that is taken to have a GPU and the tools."""
    noted = tmp_path / "noted"
    for name, noting in (("python", False), ("compute-sanitizer", True), ("env", True)):
        tool = tmp_path / name
        note = f'echo "{name} $*" >> {noted}\n' if noting else ""
        tool.write_text(f"#!/bin/sh\n{note}exit 0\n")
        tool.chmod(0o755)
    path = f"{tmp_path}:{os.environ['PATH']}"
    result = gpu_check(tmp_path / "out", "sanitize", "instrument", PYTHON=str(tmp_path / "python"), PATH=path)
    assert result.returncode == 0, result.stdout + result.stderr
    told = [line.split(" -m benchmarks check")[0] for line in noted.read_text().splitlines()]
    options = "compute-sanitizer --error-exitcode 1 --print-limit 20 --tool"
    tools = [f"{options} {tool} {tmp_path}/python" for tool in ("memcheck", "racecheck", "initcheck")]
    assert told == [*tools, f"env TRITON_INSTRUMENTATION_MODE=consan {tmp_path}/python"]


@pytest.mark.slow
def test_a_dry_stage_leaves_log_rows_and_table(tmp_path):
    earlier = {"op": "compact", "pass": "forward", "variant": "ours", "model": "tiny", "part": "q_proj", "tokens": 0,
               "rank": 0, "dtype": "float32", "keep": 0.6, "p50_ms": 2.5, "speedup": 1.5, "base": "unfused",
               "peak_mib": 1, "held_mib": 2, "share_of_limit": 0.5, "gate": "verified"}  # fmt: skip
    append(tmp_path / "rows" / "compact.csv", [earlier])
    result = gpu_check(tmp_path, "--dry", "sanitize")
    assert result.returncode == 0, result.stdout + result.stderr
    log = (tmp_path / "sanitize.log").read_text()
    assert "--tool racecheck" in log and log.count("all variants agree") == 2
    case, row, stage = (tmp_path / "summary.txt").read_text().splitlines()[1:]
    assert case == "compact tiny q_proj M 0 r 0 float32 keep 0.6, verified"
    assert row == "    ours 2.500 ms 1.5x 50% 1+2 MiB"
    assert stage.split()[0] == "sanitize" and stage.split()[-1] == "ok"
    with tarfile.open(tmp_path / "rows.tar.gz") as packed:
        assert "./compact.csv" in packed.getnames()


def test_only_the_stage_tuned_reads_tables(tmp_path):
    """A stand-in for Python notes which tables each benchmark would read, and where its rows go."""
    python, noted, out = tmp_path / "python", tmp_path / "noted", tmp_path / "out"
    python.write_text(f'#!/bin/sh\n[ "$1" = -m ] && echo "$ATP_KERNELS_TABLES $*" >> {noted}\nexit 0\n')
    python.chmod(0o755)
    stages = ("ops", "train", "whole", "tuned")
    result = gpu_check(out, "--dry", *stages, PYTHON=str(python), ATP_KERNELS_TABLES="/somewhere")
    assert result.returncode == 1 and "no tuned table: run the stage tune first" in result.stdout
    assert {line.split()[0] for line in noted.read_text().splitlines()} == {f"{out}/untuned"}
    (out / "tables").mkdir()
    (out / "tables" / "cpu.json").touch()
    noted.unlink()
    assert gpu_check(out, "--dry", "tuned", PYTHON=str(python)).returncode == 0
    timed = [line.split() for line in noted.read_text().splitlines() if " table " not in line]
    assert [words[2:4] for words in timed] == [["benchmarks", "run"], ["benchmarks.training", "--op"]]
    assert {words[0] for words in timed} == {str(out / "tables")}
    assert {words[words.index("--out") + 1] for words in timed} == {str(out / "rows" / "tuned")}


@pytest.mark.slow
def test_a_failing_stage_is_told_and_the_others_go_on(tmp_path):
    result = gpu_check(tmp_path, "--dry", "sanitize", "ops", STAGE_SECONDS="1")
    assert result.returncode == 1
    stages = (tmp_path / "summary.txt").read_text().splitlines()[1:]
    assert [line.split()[0] for line in stages] == ["sanitize", "ops"]
    assert list((tmp_path / "done").iterdir()) == []
    assert all("stopped after 1 s" in line for line in stages)


def test_a_stage_is_done_once_for_the_same_sources(tmp_path):
    """The script in a tree without git, where every command of a stage succeeds."""
    tree, out = tmp_path / "tree", tmp_path / "out"
    for folder in ("atp_kernels", "atp", "csrc", "benchmarks", "tests"):
        (tree / folder).mkdir(parents=True)
        (tree / folder / "some.py").write_text("1\n")
    for name in ("setup.py", "pyproject.toml"):
        (tree / name).touch()
    script = tree / "benchmarks" / SCRIPT.name
    shutil.copy(SCRIPT, script)
    (out / "tables").mkdir(parents=True)
    (out / "tables" / "cpu.json").touch()
    environment = {**os.environ, "OUT": str(out), "PYTHON": "true"}

    def ran():
        result = subprocess.run(["bash", str(script), "--dry"], env=environment, capture_output=True, text=True)
        assert result.returncode == 0, result.stdout + result.stderr
        lines = [line for line in (out / "summary.txt").read_text().splitlines() if line.split()[0] in STAGES]
        assert [line.split()[0] for line in lines] == STAGES
        return [line.split()[0] for line in lines if not line.endswith("done before")]

    assert ran() == STAGES
    for name in ("atp_kernels/_C.so", "benchmarks/rows.csv", "atp/some.pyc"):  # what a stage writes is no source
        (tree / name).write_text("made\n")
    assert ran() == []
    (out / "done" / "method").unlink()
    (out / "done" / "tune").write_text("cpu of other sources\n")
    assert ran() == ["method", "tune"]
    for name in ("atp/some.py", "atp_kernels/some.py", "csrc/new.cu", "tests/some.py", "setup.py"):
        (tree / name).write_text("2\n")
        assert ran() == STAGES, name
