"""A whole run beside dense LoRA: both sides on a tiny model, and the marks of given rows."""

import os
import sys

import pytest

from benchmarks import whole_run
from benchmarks.records import read

pytestmark = pytest.mark.slow

TINY = "--steps 4 --model tiny --batch 2 --length 16 --threads 1 --dtype float32".split()
SECONDS = {"atp": ["open", "saliency", "settle", "refit", "cut", "tune"], "dense": ["tune"]}


@pytest.fixture
def here(monkeypatch):
    monkeypatch.setattr(whole_run, "apart", lambda function, *arguments: function(*arguments))


@pytest.mark.skipif(sys.platform != "linux", reason="resident memory is read from /proc")
def test_rows_hold_both_sides_by_phase_and_one_side_has_no_marks(tmp_path, here, capsys):
    whole_run.main([*TINY, "--out", str(tmp_path)])
    rows = read(tmp_path / "whole_run.csv")
    for side, phases in SECONDS.items():
        found = {row["phase"]: row for row in rows if row["side"] == side}
        assert list(found) == ["start", *phases, "other", "run"]
        seconds = {phase: float(found[phase]["seconds"]) for phase in (*phases, "other", "run")}
        assert min(seconds.values()) > 0
        assert sum(seconds.values()) == pytest.approx(2 * seconds["run"], abs=0.01)
        # Saliency is measured at the end of open, and the refit happens at the start of settle.
        inside = ("saliency", "refit")
        peaks = {phase: float(found[phase]["peak_mib"]) for phase in ("start", *phases, "run") if phase not in inside}
        assert peaks.pop("run") == max(peaks.values()) and min(peaks.values()) > 0
        # Every one of 2 x 16 tokens but the first of a window is scored.
        tokens = {phase: int(found[phase]["tokens"]) for phase in (*phases, "run")}
        steps = {"open": 1, "tune": 3} if side == "atp" else {"tune": 4}
        assert tokens == {phase: 2 * 16 * steps.get(phase, 0) for phase in phases} | {"run": 4 * 2 * 16}
        # Seconds are written to the millisecond, the rate is of the unrounded ones.
        of_the_rate = tokens["tune"] / float(found["tune"]["tokens_per_second"])
        assert of_the_rate == pytest.approx(seconds["tune"], abs=0.001)
    assert {row["device"] for row in rows} != {""} and "of 3 hold" in capsys.readouterr().out
    assert whole_run.main([*TINY, "--side", "dense", "--out", str(tmp_path / "dense")]) == 0
    assert {row["side"] for row in read(tmp_path / "dense" / "whole_run.csv")} == {"dense"}
    assert "hold" not in capsys.readouterr().out


def test_a_side_runs_in_a_fresh_process():
    assert whole_run.apart(os.getpid) != os.getpid()
    with pytest.raises(EOFError):
        whole_run.apart(os._exit, 3)


@pytest.mark.parametrize("steps", [3, 10, 30, 300])
def test_phases_are_in_the_default_ratio(steps):
    found = whole_run.phases(steps)
    assert found == {"open": steps // 3, "search": 0, "settle": 0, "steps": steps}


def side(name, dtype, seconds, peak, tuned):
    same = {"side": name, "dtype": dtype}
    return [same | {"phase": "run", "seconds": seconds, "peak_mib": peak},
            same | {"phase": "tune", "seconds": 1.0, "peak_mib": tuned}]  # fmt: skip


def test_marks_are_of_the_quicker_dtype_of_each_side():
    rows = [
        *side("atp", "float32", 300.0, 10.0, 10.0), *side("atp", "bfloat16", 160.0, 2300.0, 1900.0),
        *side("dense", "float32", 100.0, 2000.0, 2000.0), *side("dense", "bfloat16", 120.0, 1.0, 1.0),
    ]  # fmt: skip
    shown = [(mark.value, mark.bound, mark.holds) for mark in whole_run.marks(rows)]
    assert shown == [(1.6, 1.6, True), (1.15, 1.1, False), (0.95, 1.0, True)]


@pytest.mark.parametrize(("seconds", "options", "status"), [(160.0, [], 0), (161.0, [], 1), (161.0, ["--lenient"], 0)])
def test_exit_status_is_that_of_the_marks(tmp_path, monkeypatch, capsys, seconds, options, status):
    rows = {"atp": side("atp", "float32", seconds, 1.0, 1.0), "dense": side("dense", "float32", 100.0, 1.0, 1.0)}
    monkeypatch.setattr(whole_run, "apart", lambda function, given, name, dtype: rows[name])
    monkeypatch.setattr(whole_run, "line", str)
    assert whole_run.main([*TINY, *options, "--out", str(tmp_path)]) == status
