"""`atp compare` on a tiny model: equal conditions, an interruption, the artifacts, and figures worked out by hand."""

import json
import re
import signal
import time

import numpy as np
import pytest
from tiny_callbacks import StopAt

from atp.baselines import methods as baselines
from atp.data import Task
from atp.evaluation.bootstrap import over_seeds
from atp.ground.errors import InputError, Interrupted, NotReached
from atp.ground.files import write_json
from atp.studies.compare import Comparison, baseline_run
from atp.studies.compare.arms import Arm
from atp.studies.compare.baseline_run import BaselineRun
from atp.studies.compare.members import Members
from atp.studies.compare.page import write_pages
from atp.studies.compare.results import Member, results, unmeasurable
from atp.studies.compare.table import markdown, table

pytestmark = pytest.mark.usefixtures("wide_budget")
METHODS = ["dense_lora", "atp", "slicegpt"]
STEPS = 6


@pytest.fixture(scope="module")
def config(config):
    """With few scores."""
    values = config.model_dump(mode="json")
    values["evaluation"]["windows"] = 4
    return type(config).parse(values)


def compare(config, folder, methods=METHODS, seeds=(0, 1), resume=False):
    return Comparison(config, methods, seeds, folder, resume=resume, command="atp compare")


def read(folder, name):
    return json.loads((folder / name).read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def finished(config, tmp_path_factory):
    folder = tmp_path_factory.mktemp("compare") / "out"
    config = config.model_copy(deep=True)
    config.export.keep_adapter = True
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("atp.inputs.promises.BUDGET_TOLERANCE", 0.02)
        return folder, compare(config, folder).execute()


def test_conditions_are_equal(finished):
    folder, content = finished
    summaries = [read(folder, f"{method}-seed{seed}/summary.json") for method in METHODS for seed in (0, 1)]
    assert len({json.dumps(s["data"]) for s in summaries}) == 1
    assert {s["train_tokens"] for s in summaries} == {STEPS * 2 * 16}
    adapters = [read(folder, f"{method}-seed0/adapter/adapter_config.json") for method in METHODS]
    assert len({(a["r"], a["lora_alpha"], tuple(sorted(a["target_modules"]))) for a in adapters}) == 1
    kept = {name: row["keep_decoder"] for name, row in content["methods"].items()}
    assert kept["dense_lora"] == kept["original"] == 1
    assert abs(kept["atp"] - 0.6) < 0.02
    assert abs(kept["slicegpt"] - 0.6) < 0.2  # multiples of 8 out of 32 are coarse
    row = content["methods"]["dense_lora"]
    assert row["relative_performance"] == row["perplexity_ratio"] == {"value": 1.0, "interval": [1.0, 1.0]}
    assert content["not_measurable"] == {} and content["methods"]["original"]["perplexity_ratio"]["value"] > 1


def test_artifacts(finished):
    folder, content = finished
    assert read(folder, "comparison.json") == content
    rows = (folder / "comparison.md").read_text(encoding="utf-8")
    assert all(re.search(rf"^\| {name} \| \d\.\d", rows, flags=re.MULTILINE) for name in ["original", *METHODS])
    page = (folder / "comparison.html").read_text(encoding="utf-8")
    assert "<svg" in page and 'src="http' not in page
    assert (folder / "comparison.png").read_bytes().startswith(b"\x89PNG")
    suffixes = {path.suffix for path in folder.rglob("*") if path.is_file()}
    assert not suffixes & {".bin", ".pt", ".pth", ".pkl"}


def test_where_the_dense_model_has_learnt_nothing_the_page_says_not_measurable(finished, tmp_path):
    """Every cell of relative performance, the remarks, and no panel of the picture."""
    members = [member("dense_lora", 0, 0), member("static", 0, 4)]
    unclear = unmeasurable(members, [QA], WRONG)
    content = finished[1] | {"methods": results(members, [QA], WRONG), "not_measurable": unclear, "majority": {}}
    assert content["methods"]["static"]["relative_performance"] is None
    write_pages(tmp_path, content)
    rows = (tmp_path / "comparison.md").read_text(encoding="utf-8").splitlines()
    assert sum(row.count("| not measurable |") for row in rows if row.startswith("|")) == 3
    page = (tmp_path / "comparison.html").read_text(encoding="utf-8").replace("&#39;", "'")
    sentence = f"Relative performance in qa accuracy is not measurable: {unclear['qa accuracy']}."
    assert sentence in page and page.count("<td>not measurable</td>") == 3
    assert "perplexity / dense" in page and "relative performance</text>" not in page


def test_the_majority_label_stands_beside_the_methods(finished):
    """Of 60 questions half are answered yes; the constant answer's row has the scores of those that are tested."""
    folder, content = finished
    found, evaluation = content["majority"]["qa"], read(folder, "atp-seed0/evaluation.json")
    truth = [truth for truth, _ in evaluation["final"]["tasks"]["qa"]["items"]]
    assert found["accuracy"] == truth.count(found["label"]) / len(truth)
    assert found == {key: value for key, value in evaluation["majority"]["qa"].items() if key != "items"}
    head, rows = table(content)
    assert [row for row in rows if row[0] == "majority label"] == [rows[-1]]
    low, high = found["macro_f1_interval"]
    assert rows[-1][head.index("qa macro f1 ↑")] == f"{found['macro_f1']:.3f} ({low:.3f} to {high:.3f})"
    assert set(rows[-1][1:]) - {rows[-1][head.index("qa macro f1 ↑")]} == {"–"}
    assert "| majority label | – |" in (folder / "comparison.md").read_text(encoding="utf-8")


def test_an_interrupted_comparison_goes_on_and_ends_the_same(config, finished, tmp_path, monkeypatch):
    whole, expected = finished
    folder, tuner = tmp_path / "out", baseline_run.LoraTuner
    methods = ["dense_lora", "slicegpt"]

    def stopping(settings, model, data, run, *, callbacks, **options):
        stop = [StopAt(4, signal.SIGTERM)] if run.name == "slicegpt-seed0" else []
        return tuner(settings, model, data, run, callbacks=[*callbacks, *stop], **options)

    monkeypatch.setattr(baseline_run, "LoraTuner", stopping)
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "launch")
    with pytest.raises(Interrupted):
        compare(config, folder, methods, seeds=[0]).execute()
    broken = read(folder, "comparison.json")
    assert broken["missing"] == ["slicegpt, seed 0"] and "Not finished: slicegpt" in markdown(broken)
    monkeypatch.undo()
    with pytest.raises(InputError, match="--resume"):
        compare(config, folder, methods, seeds=[0]).execute()
    untouched = (folder / "dense_lora-seed0" / "summary.json").stat().st_mtime_ns
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "launch")  # the same torchrun starts its processes again
    content = compare(config, folder, methods, seeds=[0]).execute()
    assert (folder / "dense_lora-seed0" / "summary.json").stat().st_mtime_ns == untouched
    assert not content["missing"]
    member = "slicegpt-seed0/evaluation.json"
    for key in ("perplexity", "items", "tasks"):
        assert read(folder, member)["final"][key] == read(whole, member)["final"][key]
    steps = [
        json.loads(line)["step"] for line in (folder / "slicegpt-seed0" / "metrics.jsonl").read_text().splitlines()
    ]
    assert steps == list(range(1, STEPS + 1))
    assert expected["methods"]["slicegpt"]["keep_decoder"] == content["methods"]["slicegpt"]["keep_decoder"]


def test_resume_refuses_another_config(config, finished):
    folder, _ = finished
    changed = config.model_copy(deep=True)
    changed.training.lr = 1.0
    with pytest.raises(InputError, match=r"training\.lr: 0\.005 -> 1\.0"):
        compare(changed, folder, resume=True).execute()


def test_a_member_that_writes_the_inputs_second_goes_on_unless_they_differ(config, tmp_path, monkeypatch):
    """Another process, whose temporary file has the same name, replaces the inputs first."""
    ours = {"model": "a", "data": "b"}

    def beaten(path, content):
        write_json(path, theirs)
        raise FileNotFoundError(path)

    monkeypatch.setattr("atp.studies.compare.members.write_json", beaten)
    look = Members(config, tmp_path, command="")._original(Arm("random"))
    theirs = ours
    assert look(ours) is None and json.loads((tmp_path / "inputs.json").read_text()) == ours
    (tmp_path / "inputs.json").unlink()
    theirs = ours | {"data": "c"}
    with pytest.raises(InputError, match="data is not what the run was started with"):
        look(ours)


QA = Task("qa", ("yes", "no"), ("accuracy",))
WRONG = {"qa": {"items": [["yes", "no"]] * 10}}  # a majority label that is never right


def member(method, seed, right, nll=1.0):
    """A finished run that answered `right` of ten questions and has this loss on five documents."""
    items = [["yes", "yes" if i < right else "no"] for i in range(10)]
    scores = {"items": [[nll * 8, 8]] * 5, "tasks": {"qa": {"items": items}}}
    summary = {"megabytes": {"original": 0.4, "final": 0.28}, "params_before": 100, "params_after": 70,
               "keep_decoder": 0.6, "keep_total": 0.7, "train_tokens": 640,
               "seconds": {"choose": 1.0, "tune": 4.0 - seed, "total": 99.0}}  # fmt: skip
    return Member(method, seed, summary, {"original": scores, "final": scores})


def test_figures_by_hand():
    content = {"methods": results([member("static", 0, 4)], [QA], WRONG)}
    assert "relative_performance" not in content["methods"]["static"], "without a dense model"
    head, rows = table(content)
    assert all(len(row) == len(head) for row in rows) and rows[1][head.index("relative performance ↑")] == "–"
    found = results([member("dense_lora", 0, 8), member("dense_lora", 1, 10), member("static", 0, 4, nll=2.0),
                     member("static", 1, 10, nll=1.5)], [QA], WRONG)  # fmt: skip
    assert found["dense_lora"]["relative_performance"] == {"value": 1.0, "interval": [1.0, 1.0]}
    row = found["static"]
    assert row["scores"]["qa accuracy"]["value"] == pytest.approx((0.4 + 1.0) / 2)
    assert row["relative_performance"]["value"] == pytest.approx((4 / 8 + 10 / 10) / 2)
    assert row["perplexity_ratio"]["value"] == pytest.approx((np.e + np.exp(0.5)) / 2)
    assert row["perplexity_ratio"]["interval"] == pytest.approx([np.exp(0.5), np.e])  # equal documents: seeds alone
    assert row["train_seconds"] == pytest.approx(4.5) and row["train_tokens_per_second"] == pytest.approx(640 / 4.5)
    assert row["seeds"] == [0, 1]


@pytest.mark.parametrize(("right", "measurable"), [((8, 10), True), ((8, 0), False), ((0, 0), False)])
def test_dense_must_beat_the_majority_label_over_all_seeds(right, measurable):
    """A seed that learns nothing leaves it open whether the dense model learns the task at all."""
    members = [member("dense_lora", seed, count) for seed, count in enumerate(right)]
    mean = results(members, [QA], WRONG)["dense_lora"]["relative_performance"]
    assert (mean is not None) == measurable
    assert list(unmeasurable(members, [QA], WRONG)) == ([] if measurable else ["qa accuracy"])


def test_interval_over_seeds_and_items_matches_the_analytic_spread():
    """Means over two seeds of normal draws: seed resampling adds the spread between the seeds to that of the items."""
    rng = np.random.default_rng(2)
    noise = rng.normal(size=(2, 20000))
    low, high = over_seeds([(0.0, noise[0]), (4.0, 4.0 + noise[1])])["interval"]
    # Of the resampled means a quarter is N(0, 1), a quarter N(4, 1) and half N(2, 1/2).
    mixture = np.concatenate([noise[0], 4 + noise[1], 2 + rng.normal(scale=0.5**0.5, size=40000)])
    assert (low, high) == pytest.approx(tuple(np.quantile(mixture, [0.025, 0.975])), abs=0.1)


@pytest.mark.parametrize(("name", "value"), [("cut_vs_reloaded", float("nan")), ("merge_error", 2.0)])
def test_a_baseline_whose_model_is_not_the_trained_one_fails(config, tmp_path, monkeypatch, name, value):
    """Its certificate is checked as ATP's own is."""
    original = baseline_run.export_model
    monkeypatch.setattr(baseline_run, "export_model", lambda *given: original(*given) | {name: value})
    with pytest.raises(NotReached, match=name):
        compare(config, tmp_path / "out", ["dense_lora"], seeds=[0]).execute()


@pytest.mark.parametrize(
    ("section", "key", "value", "methods", "message"),
    [
        ("decisions", "target_keep", 0.01, ["dense_lora", "atp"], "the nearest share .* keep"),
        ("data", "length", 4096, ["dense_lora"], "data.length is 4096, but the model has only 2048 positions"),
        ("data", "labels", ["yes", "no", "perhaps", "surely"], ["dense_lora"], "become the same tokens"),
    ],
)
def test_what_one_member_cannot_do_is_refused_before_the_first(config, tmp_path, section, key, value, methods, message):
    config = config.model_copy(deep=True)
    setattr(getattr(config, section), key, value)
    with pytest.raises(InputError, match=message):
        compare(config, tmp_path / "out", methods, seeds=[0]).execute()
    assert not list(tmp_path.iterdir())


def baseline(config, folder, resume):
    values = config.model_dump(mode="json") | {"output_dir": str(folder)}
    settings = type(config).parse(values)
    return BaselineRun("static", settings, resume=resume, command="atp compare", say=lambda line: None)


def test_the_refit_counts_and_a_resumed_run_counts_choosing_once_and_removing_again(config, tmp_path, monkeypatch):
    refit = baselines.refit_readers
    monkeypatch.setattr(baselines, "refit_readers", lambda *args: (time.sleep(0.7), refit(*args)))
    first = baseline(config, tmp_path, resume=False)
    with monkeypatch.context() as patch:
        patch.setattr(baseline_run, "export_model", stop)
        with pytest.raises(Stopped):
            first.execute()
    choosing = first._scores()["choice"]["seconds"]
    seconds = baseline(config, tmp_path, resume=True).execute()["seconds"]
    assert set(seconds) == {"choose", "apply", "tune", "total"}
    assert seconds["choose"] == choosing and seconds["apply"] > 0.7 and seconds["tune"] > 0
    assert seconds["total"] > seconds["apply"] + seconds["tune"]


class Stopped(Exception):
    """Ends a run before its export."""


def stop(*_args):
    raise Stopped
