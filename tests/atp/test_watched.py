"""A run that a program watches: JSON on stderr, a Prometheus file, and no secret of the environment anywhere."""

import io
import json
import re
import sys
from contextlib import redirect_stderr, redirect_stdout
from types import SimpleNamespace

import pytest
import yaml
from accelerate import tracking

from atp.cli.cli import main


class Diary(tracking.GeneralTracker):
    name, requires_logging_directory = "diary", True
    tracker = property(lambda self: self)

    def __init__(self, project, logging_dir, **kwargs):
        super().__init__()
        self.file = logging_dir + "-diary.jsonl"

    def start(self):
        pass

    def note(self, *values):
        with open(self.file, "a") as file:
            print(json.dumps(values), file=file)

    def store_init_configuration(self, values):
        self.note("config", values)

    def log(self, values, step=None, **kwargs):
        self.note(step, values)

    def finish(self):
        self.note("end")


SECRETS = {
    "HF_TOKEN": "hf_PlantedTokenOfTheHub0123456789",
    "WANDB_API_KEY": "0123456789abcdef0123456789planted",
    "HUGGING_FACE_HUB_TOKEN": "hf_PlantedOldNameOfTheToken01",
}
STEPS = 6


@pytest.fixture(scope="module")
def watched(config, tmp_path_factory):
    folder = tmp_path_factory.mktemp("watched")
    training = {"report_to": ["diary"], "metrics_file": str(folder / "atp.prom"), "log_every": 2}
    values = config.model_dump(mode="json") | {"output_dir": str(folder / "out"), "export": {"keep_adapter": True}}
    values["training"] |= training
    values["evaluation"] |= {"dense_baseline": False}
    (folder / "config.yaml").write_text(yaml.safe_dump(values), encoding="utf-8")
    out, err = io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(out), redirect_stderr(err):
        patch.setitem(tracking.LOGGER_TYPE_TO_CLASS, "diary", Diary)
        patch.setattr("atp.inputs.promises.BUDGET_TOLERANCE", 0.02)
        patch.setattr(sys, "argv", ["atp", "train", str(folder / "config.yaml"), "--json-logs"])
        for name, value in SECRETS.items():
            patch.setenv(name, value)
        with pytest.raises(SystemExit) as done:
            main()
    assert done.value.code == 0, err.getvalue()[-2000:]
    return SimpleNamespace(stdout=out.getvalue(), stderr=err.getvalue()), folder


@pytest.mark.slow
def test_every_line_on_stderr_is_a_json_object_with_time_and_phase(watched):
    lines = [json.loads(line) for line in watched[0].stderr.splitlines()]
    assert all(re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}\+00:00", line["time"]) for line in lines)
    assert [line["time"] for line in lines] == sorted(line["time"] for line in lines)
    phases = list(dict.fromkeys(line["phase"].partition(":")[0] for line in lines))
    assert phases == [
        "starting", "loading", "scoring the original model", "answers of the original model", "saliency",
        "search", "settle", "refit", "cut", "tune", "export", "scoring the final model",
        "answers of the final model", "speed of the original and the final model", "report",
    ]  # fmt: skip
    assert any("exporting" in line.get("message", "") for line in lines)


def test_steps_are_told_alike_by_json_metrics_and_the_prometheus_file(watched):
    done, folder = watched
    steps = [line for line in map(json.loads, done.stderr.splitlines()) if "step" in line]
    records = list(map(json.loads, (folder / "out" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()))
    assert [line["step"] for line in steps] == list(range(2, STEPS + 1, 2)) and len(records) == len(steps)
    for line, record in zip(steps, records, strict=True):
        assert line.keys() == {"time", "phase", "step", "steps", "loss", "kept", "tokens_per_second"}
        shown = (line["phase"], line["loss"], line["kept"], line["tokens_per_second"], line["steps"])
        assert shown == (record["phase"], record["loss"], record.get("keep"), record["tokens_per_second"], STEPS)
    text = (folder / "atp.prom").read_text(encoding="utf-8")
    found = re.findall(r'^atp_(\w+)\{run="([^"]+)",phase="(\w+)"\} (\S+)$', text, re.MULTILINE)
    values = {name: float(value) for name, _, _, value in found}
    assert {(run, phase) for _, run, phase, _ in found} == {(str(folder / "out"), "tune")}
    last = records[-1]
    assert (values["step"], values["steps"], values["skipped_steps"]) == (STEPS, STEPS, 0)
    assert (values["loss"], values["tokens_per_second"]) == (last["loss"], last["tokens_per_second"])
    assert 1e7 < values["memory_bytes"] < 1e11 and 0 <= values["checkpoint_age_seconds"] < 60
    # Each sample stands below its own HELP and TYPE, and nothing else is there.
    names = [name for name, *_ in found]
    expected = [line for name in names for line in (f"# HELP atp_{name} ", f"# TYPE atp_{name} gauge", f"atp_{name}{{")]
    assert all(line.startswith(start) for line, start in zip(text.splitlines(), expected, strict=True))
    assert not list(folder.glob(".writing-*"))


def test_no_secret_of_the_environment_is_shown_or_written(watched):
    done, folder = watched
    files = [path for path in folder.rglob("*") if path.is_file()]
    names = {path.name for path in files}
    assert {"README.md", "config.yaml", "summary.json", "report.html", "trackers-diary.jsonl", "atp.prom"} <= names
    contents = {str(path): path.read_bytes() for path in files}
    contents |= {"stdout": done.stdout.encode(), "stderr": done.stderr.encode()}
    found = [(name, key) for name, text in contents.items() for key, value in SECRETS.items() if value.encode() in text]
    assert found == []
    assert b'"config"' in contents[str(folder / "out" / "trackers-diary.jsonl")], "the tracker was told something"
