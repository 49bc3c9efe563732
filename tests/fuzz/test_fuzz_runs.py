"""One of the runs under settings at random, and that the harness notices what it is there for."""

import fuzz_runs
import pytest

from atp.ground.errors import InputError

pytestmark = pytest.mark.slow


def test_nothing_but_a_sentence_stops_a_run(tmp_path, monkeypatch):
    fuzz_runs.widen_budget(monkeypatch)
    assert fuzz_runs.run_case(0, 5, tmp_path) == "swept"


def refuse(config):
    raise InputError("no")


def trained(config, folder, **options):
    (folder / "model").mkdir(parents=True, exist_ok=True)
    (folder / "config.yaml").write_text("")
    (folder / "metrics.jsonl").write_text("")
    (folder / "decisions.json").write_text("resumed" if options.get("resume") else "whole")


@pytest.mark.parametrize(
    ("instead", "says"),
    [
        ({"make_plan": refuse}, "plan: no; train: None"),
        ({"write_report": lambda folder: {}[folder.name]}, "whole"),
        ({"write_report": str}, "a resumed run left other bytes"),
    ],
)
def test_the_harness_notices(instead, says, tmp_path, monkeypatch):
    for name, function in ({"make_plan": bool, "start": trained} | instead).items():
        monkeypatch.setattr(fuzz_runs, name, function)
    with pytest.raises((AssertionError, KeyError), match=says) as found:
        fuzz_runs.run_case(0, 0, tmp_path)
    assert found.value.__notes__[0].startswith("settings: {")
