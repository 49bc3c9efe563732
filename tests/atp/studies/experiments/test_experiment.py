"""Experiment files, their runs on a tiny model, and the record that they leave."""

import csv
import json
import math
import shutil
from pathlib import Path

import pytest
import yaml
from safetensors.torch import load_file, save_file

from atp.cli.scoring import Scoring, score_folder
from atp.ground.errors import InputError
from atp.studies.compare.members import Members
from atp.studies.experiments import Experiment, ExperimentSpec
from atp.studies.experiments.rows import append_rows, changed_share, validation_perplexity

pytestmark = pytest.mark.usefixtures("wide_budget")
SPEC = {
    "question": "Which?",
    "domains": ["custom"],
    "arms": [
        {"method": ["dense_lora", "static"]},
        {"method": "atp", "vary": {"decisions.target_keep": [0.6, 0.8]}},
    ],
    "picture": "curve",
    "x": "decisions.target_keep",
}


@pytest.fixture
def write(config, tmp_path):
    """Writes an experiment file, and base.yaml beside it; returns the path."""
    base = config.model_dump(mode="json", exclude={"output_dir"})
    base["evaluation"] |= {"windows": 4}
    (tmp_path / "base.yaml").write_text(yaml.safe_dump(base), encoding="utf-8")

    def file(**changes):
        path = tmp_path / "which.yaml"
        path.write_text(yaml.safe_dump(SPEC | changes), encoding="utf-8")
        return str(path)

    return file


def experiment(path, folder, overrides=(), **options):
    places = {"runs": folder / "runs", "out": folder / "out"}
    return Experiment(path, list(overrides), command="atp experiment", **places, **options)


def rows_of(folder, name="which"):
    with (folder / "out" / f"{name}.csv").open(encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_record_of_an_experiment(write, tmp_path):
    path = write()
    content = experiment(path, tmp_path).execute()
    labels = ["dense_lora", "static", "atp target_keep=0.6", "atp target_keep=0.8"]
    assert list(content["domains"]["custom"]) == ["original", *labels] and not content["missing"]
    majority = content["majority"]["custom"]["qa"]
    assert majority["n"] == 7 and content["not_measurable"] == {"custom": {}}
    rows = rows_of(tmp_path)
    assert [row["arm"] for row in rows] == labels
    for row in rows:
        kept = 1.0 if row["arm"] == "dense_lora" else float(row["target_keep"])
        assert float(row["keep_decoder"]) == pytest.approx(kept, abs=0.02)
        summary = json.loads((tmp_path / "runs/custom" / folder_of(row["arm"]) / "summary.json").read_text())
        assert float(row["perplexity"]) == pytest.approx(summary["perplexity"]["final"], abs=1e-3)
        assert float(row["qa macro_f1 majority label"]) == pytest.approx(majority["macro_f1"], abs=1e-4)
        assert float(row["perplexity low"]) <= float(row["perplexity"]) <= float(row["perplexity high"])
        assert (row["frozen_vs_cut"] != "") == row["arm"].startswith("atp") == (row["changed"] != "")
    assert (tmp_path / "out" / "which.png").read_bytes().startswith(b"\x89PNG")

    # The same settings are the same run, in whichever experiment; what is there is read.
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "runs").rglob("summary.json")}
    again = experiment(write(arms=[{"method": ["dense_lora", "atp"]}], picture="intervals", x=None), tmp_path).execute()
    assert list(again["domains"]["custom"]) == ["original", "dense_lora", "atp"]
    assert {p: p.stat().st_mtime_ns for p in (tmp_path / "runs").rglob("summary.json")} == before
    assert [row["arm"] for row in rows_of(tmp_path)] == [*labels[1:], "dense_lora", "atp"], "rows of old are kept"

    curve = (tmp_path / "out" / "which.png").read_bytes()
    experiment(write(arms=[{"method": ["atp", "static"]}], picture="decisions", x=None), tmp_path).execute()
    assert (tmp_path / "out" / "which.png").read_bytes() != curve
    with pytest.raises(InputError, match="cannot resume under a changed config .*lora.r: 16 -> 4"):
        experiment(path, tmp_path, ["lora.r=4"]).execute()


def test_the_sealed_half_of_finished_runs_is_scored_once(write, tmp_path):
    path = write(arms=[{"method": "random"}], picture="intervals", x=None, seeds=[0, 1])
    small = ["training.tune=1", "evaluation.questions=2"]
    content = experiment(path, tmp_path, small, sealed=True).execute()
    assert content["missing"] == ["custom, random, seed 0", "custom, random, seed 1"], "nothing runs"
    assert not (tmp_path / "runs").exists() and not rows_of(tmp_path, "which-sealed")
    experiment(path, tmp_path, small, seeds=[0]).execute()
    content = experiment(path, tmp_path, small, sealed=True).execute()
    assert content["missing"] == ["custom, random, seed 1"]
    (row,) = rows_of(tmp_path, "which-sealed")
    (opened,) = rows_of(tmp_path)
    changing = {"perplexity", "bits_per_byte", "qa", "original", "finished", "experiment"}
    assert {name for name in row if row[name] != opened[name]} <= {n for n in row if n.split()[0] in changing}

    run = tmp_path / "runs" / "custom" / "random-seed0"
    config = yaml.safe_load((run / "resolved.yaml").read_text())
    assert config["data"]["test_half"] == "open"
    config["data"]["test_half"] = "sealed"
    (tmp_path / "sealed.yaml").write_text(yaml.safe_dump(config))
    scored = score_folder(str(run / "model"), Scoring(suite=str(tmp_path / "sealed.yaml")))
    assert float(row["perplexity"]) == pytest.approx(scored["perplexity"], abs=1e-4) != float(opened["perplexity"])
    assert float(row["qa macro_f1"]) == pytest.approx(scored["tasks"]["qa"]["macro_f1"], abs=1e-4)

    shutil.rmtree(run / "model")
    experiment(path, tmp_path, small, sealed=True).execute()
    assert rows_of(tmp_path, "which-sealed") == [row], "what was scored is read"
    (run / "sealed.json").unlink()
    (run / "resolved.yaml").write_text(yaml.safe_dump(config | {"data": config["data"] | {"test_half": None}}))
    with pytest.raises(InputError, match="random-seed0 scored all test documents, so none of them is sealed"):
        experiment(path, tmp_path, small, sealed=True).execute()


def folder_of(label):
    method, _, setting = label.partition(" target_keep=")
    return f"{method}-seed0" if setting in ("", "0.6") else f"{method},decisions.target_keep={setting}-seed0"


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"arms": [{"method": "atb"}]}, "method 'atb' is unknown: did you mean 'atp'"),
        ({"arms": [{"method": "atp", "sett": {}}]}, "unknown config key 'arms.0.sett': did you mean 'set'"),
        ({"arms": [{"method": "atp", "set": {"lora.q": 1}}]}, "unknown config key 'lora.q'"),
        ({"arms": [{"method": ["atp", "atp"]}], "picture": "intervals"}, "two arms are called 'atp'"),
        ({"x": "lora.r"}, "a curve needs x"),
        ({"base": "none.yaml"}, "none.yaml does not exist"),
        ({"domains": []}, "domains"),
        ({"seeds": ["one"]}, "seeds.0"),
        ({"seeds": [-1]}, "seeds.0' is -1: input should be greater than or equal to 0"),
        ({"seeds": [2**32]}, "seeds.0' is 4294967296"),
        ({"arms": [{"method": "atp", "vary": {f"lora.{n}": list(range(10)) for n in range(6)}}]}, "1,000,000 arms"),
        ({"arms": [{"method": "m" * 10**4}]}, r"method 'm+\.\.\.' is unknown"),
        ({"base": "which.yaml"}, "unknown config key 'question'|is missing"),
        ({"base": "."}, "is a folder"),
    ],
)
def test_bad_files_are_one_sentence_before_any_run(write, tmp_path, changes, sentence):
    with pytest.raises(InputError, match=sentence.replace("'", ".")):
        experiment(write(**{"picture": "intervals", "x": None} | changes if "x" not in changes else changes),
                   tmp_path).execute()  # fmt: skip
    assert not list(tmp_path.rglob("summary.json"))


@pytest.mark.timeout(10)
@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("question: &a [x, x]\narms: [*a, *a]", "an alias"),
        ("question: x\nseeds: [" + "9" * 5000 + "]", "is not of type int"),
        ("arms: " + "[" * 99, "nested deeper"),
        ("just text", "should be a valid dictionary"),
    ],
)
def test_damaged_files_are_one_sentence(write, text, reason):
    path = Path(write())
    path.write_text(text, encoding="utf-8")
    with pytest.raises(InputError, match=reason):
        ExperimentSpec.load(str(path))
    write()
    (path.parent / "base.yaml").write_text(text if "text" not in text else "- a", encoding="utf-8")
    with pytest.raises(InputError, match="an alias|is not of type int|nested deeper|is not a mapping"):
        ExperimentSpec.load(str(path))[0].config(path, "custom", [])


def test_a_row_has_the_validation_score_of_the_adapter_that_the_run_ended_with(write, tmp_path):
    keep = {"training.keep_best": [True, False]}
    path = write(arms=[{"method": "atp", "vary": keep}], picture="intervals", x=None, domains=["custom"])
    worse = ["training.tune=20", "training.lr=0.5", "training.schedule=constant"]
    experiment(path, tmp_path, ["evaluation.every=1", *worse]).execute()
    for row, folder in zip(rows_of(tmp_path), ("atp,training.keep_best=true-seed0", "atp-seed0"), strict=True):
        found = json.loads((tmp_path / "runs/custom" / folder / "summary.json").read_text())["validation"]
        loss = found["best"]["loss"] if "true" in folder else found["last"]
        assert float(row["validation perplexity"]) == pytest.approx(math.exp(loss), abs=1e-4), folder
        assert found["best"]["loss"] < found["last"], "else both cases are one"


def test_a_diverged_run_has_an_infinite_validation_perplexity():
    for best in (None, {"step": 2, "loss": 1.0}):
        assert validation_perplexity({"best": best, "last": 1e4, "last_step": 3, "kept_step": 3}) == math.inf


def test_unknown_name_lists_those_there_are(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "experiments").mkdir()
    (tmp_path / "experiments" / "curve.yaml").write_text("question: x", encoding="utf-8")
    with pytest.raises(InputError, match="curves.yaml does not exist.*here: .*curve, "):
        ExperimentSpec.load("curves")


def test_an_arm_can_leave_open_what_the_base_sets(write, config, tmp_path):
    spec, path = ExperimentSpec.load(
        write(arms=[{"method": "atp", "set": {"evaluation.every": None}}], picture="intervals", x=None)
    )
    common = spec.config(path, "custom", ["evaluation.every=5"])
    (arm,) = spec.labelled_arms().values()
    assert arm.overrides == ("evaluation.every=null",)
    found = Members(common, tmp_path / "runs", command="").config_of(arm, 0)
    assert (common.evaluation.every, found.evaluation.every) == (5, None)


def test_rows_of_the_same_run_are_replaced_and_all_others_stay(tmp_path):
    """Of the same run are also those from before a fingerprint held the model, which say when they ended."""
    path = tmp_path / "x.csv"
    same = {"experiment": "x", "domain": "d", "arm": "a", "config": "c"}
    append_rows(path, [same | {"seed": 0, "perplexity": 5.0}, same | {"seed": 1, "perplexity": 6.0}])
    append_rows(path, [same | {"seed": 0, "perplexity": 4.0, "accuracy": 0.5}])
    old = same | {"finished": "2026-12-01 10:00", "perplexity": 5.0, "seed": 2}
    append_rows(path, [old | {"config": "old"}, old | {"config": "old", "seed": 3}])
    append_rows(path, [old | {"config": "new"}, old | {"config": "new", "seed": 3, "perplexity": 4.0}])
    with path.open(encoding="utf-8") as file:
        found = [(row["config"], row["seed"], row["perplexity"], row["accuracy"]) for row in csv.DictReader(file)]
    assert found == [("c", "1", "6.0", ""), ("c", "0", "4.0", "0.5"), ("old", "3", "5.0", ""), ("new", "2", "5.0", ""),
                     ("new", "3", "4.0", "")]  # fmt: skip


def test_rows_of_another_model_stay(write, config, tmp_path):
    """Another model, and then other weights behind the same path."""
    arms = {"arms": [{"method": "random"}], "picture": "intervals", "x": None}
    spec = write(**arms)
    small = ["training.tune=1", "evaluation.questions=2"]
    experiment(spec, tmp_path, small).execute()
    model = shutil.copytree(config.model.path, tmp_path / "model")
    given = [*small, f"model.path={model}"]
    for runs, count in (("second", 2), ("third", 3)):
        tensors = load_file(model / "model.safetensors")
        moved = {name: tensor + 1e-2 for name, tensor in tensors.items()}
        save_file(moved, model / "model.safetensors", metadata={"format": "pt"})
        Experiment(spec, given, command="", runs=tmp_path / runs, out=tmp_path / "out").execute()
        assert len(rows_of(tmp_path)) == len({row["config"] for row in rows_of(tmp_path)}) == count
    Experiment(spec, given, command="", runs=tmp_path / "third", out=tmp_path / "out").execute()
    assert len(rows_of(tmp_path)) == 3, "a run that is read again replaces its row"


def test_changed_share_is_the_mean_after_the_budget_is_reached(tmp_path):
    shares = [(0.9, 0.5), (0.6, 0.2), (0.6, 0.1)]
    records = [
        {"step": step, "phase": "search", "target_keep": keep, "changed": changed}
        for step, (keep, changed) in enumerate(shares)
    ]
    text = "".join(json.dumps(record) + "\n" for record in [*records, {"step": 3, "phase": "tune"}]) + '{"step": 4, "ph'
    (tmp_path / "metrics.jsonl").write_text(text, encoding="utf-8")
    assert changed_share(tmp_path) == pytest.approx(0.15)
    assert changed_share(tmp_path / "none") == ""


FOLDER = Path(__file__).parents[4] / "experiments"
FILES = sorted(path.stem for path in FOLDER.glob("*.yaml") if not path.stem.endswith("base"))


@pytest.mark.parametrize("name", FILES)
def test_files_in_the_repository_can_be_run(name, pytestconfig, monkeypatch):
    monkeypatch.chdir(pytestconfig.rootpath)
    spec, path = ExperimentSpec.load(name)
    overrides = ["model.path=tiny"]
    for domain in spec.domains:
        config = spec.config(path, domain, overrides)
        assert config.data.recipe == domain
        for arm in spec.labelled_arms().values():
            type(config).parse(config.model_dump(mode="json"), list(arm.overrides))
