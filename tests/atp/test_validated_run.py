"""A whole run and a baseline's that are watched on a validation split: what they leave, and what the plan counted."""

import json

import pytest
from tiny_command import read, start

from atp.plan import make_plan
from atp.report import write_report
from atp.studies.compare.baseline_run import BaselineRun

WATCHED = {"evaluation": {"every": 2, "dense_baseline": True}, "training": {"keep_best": True}}


@pytest.fixture(scope="module")
def watched(config, tmp_path_factory):
    folder = tmp_path_factory.mktemp("watched") / "out"
    start(config, folder, **WATCHED)
    return folder


def scores(folder):
    lines = map(json.loads, (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines())
    return {record["step"]: record["validation_loss"] for record in lines if "validation_loss" in record}


def test_summary_report_and_plan_tell_of_the_scores_and_a_run_without_has_no_trace(watched, finished, config):
    summary, found = read(watched, "summary.json"), scores(watched)
    validation = summary["validation"]
    assert list(found) == [2, 4, 6] == list(scores(watched / "dense_lora"))
    assert validation["last"] == found[6] and validation["last_step"] == 6
    assert validation["kept_step"] == validation["best"]["step"] >= 3, "before the cut there is nothing to keep"
    assert len({validation[name] for name in ("masked", "refitted", "cut")}) == 3, "each is scored after a change"
    assert 0 < summary["seconds"]["validation"] < summary["seconds"]["total"]
    assert "validation" in summary["data"] and "validation," in summary["data"]["description"]
    page = write_report(watched).read_text(encoding="utf-8")  # again: reports of tests' runs have no drawings
    assert ">validation</text>" in page and "and the validation loss" in page
    other = read(finished, "summary.json")
    for name in ("test", "calibration"):
        assert summary["data"][name] == other["data"][name]
    assert "validation" not in other and "validation" not in other["data"] and not scores(finished)
    values = config.model_dump(mode="json")
    values["evaluation"] |= WATCHED["evaluation"]
    plan = make_plan(type(config).parse(values))
    row = next(row for row in plan["cost"] if row["phase"] == "validation")
    samples = plan["data"]["windows"]["validation"]  # each scored at 3 steps, in 3 states, and at 3 dense steps
    assert row["tokens"] == (3 + 3 + 3) * min(samples, 1) * 16


def test_a_baseline_is_watched_from_its_first_step(config, tmp_path):
    values = config.model_dump(mode="json") | {"output_dir": str(tmp_path / "out")}
    values["evaluation"] |= {"every": 3}
    values["training"] |= {"patience": 1, "lr": 0.5, "warmup": 0, "schedule": "constant", "tune": 12, "search": 0}
    values["decisions"] |= {"source": "tuned"}
    summary = BaselineRun("random", type(config).parse(values), resume=False, command="atp", say=str).execute()
    found = summary["validation"]
    assert found["last_step"] == found["best"]["step"] + 3 < 12, "it stops at the first score that is no better"
    assert found["kept_step"] == found["last_step"] and "cut" not in found
