"""`atp sweep` on a tiny model: each target is the run of its own, bit for bit, from one open phase."""

import csv
import io
import json
import math

import pytest
import torch
from rich.console import Console
from tiny_command import everything, one_in_four, read, results, start, stopping_at
from transformers import AutoModelForCausalLM

from atp.ground.errors import InputError, NotReached
from atp.plan import latency
from atp.plan.latency import LatencyTable
from atp.run import Run
from atp.studies.engines import Here
from atp.studies.sweep import Sweep
from atp.studies.sweep import sweep as sweeps
from atp.studies.sweep.shared import SharedRun
from atp.studies.sweep.table import recommend, show, tables
from atp.studies.sweep.targets import targets_of
from atp.studies.sweep.units import UNITS
from atp.training import checkpoint as checkpoints
from atp.training import trainer as trainers
from atp.training.resume import for_target

pytestmark = pytest.mark.usefixtures("wide_budget")

AT_ONCE = {"open": 2, "search": 0, "settle": 0, "tune": 2}
CASES = {
    "tuned": (AT_ONCE, {}),
    "learned, after an open phase": (AT_ONCE | {"search": 2, "settle": 1}, {"source": "learned"}),
    "nothing open, saliency at once": (AT_ONCE | {"open": 0}, {"source": "static"}),
    "decisions from the first step on": ({"search": 2, "settle": 1, "tune": 1}, {"source": "learned", "init": "paper"}),
}


def small(config, training=AT_ONCE, decisions=(), **sections):
    """The tiny config with few scores, and a sweep's settings."""
    values = config.model_dump(mode="json") | {"export": {"keep_adapter": True}}
    values["training"] |= {"open": None} | training
    values["decisions"] |= dict(decisions)
    values["evaluation"] |= {"dense_baseline": False, "windows": 4, "questions": 2}
    for section, keys in sections.items():
        values[section] |= keys
    return type(config).parse(values)


def asked(keep=(), **others):
    """Targets by option, as lists of numbers: keep=[0.8], prefill_ms=[18]."""
    given = {"keep": keep} | others
    return [
        one for unit in UNITS for one in unit.parse(",".join(map(str, given.get(unit.option.replace("-", "_"), ()))))
    ]


def sweep(config, keep, folder, *, resume=False, say=lambda line: None, **others):
    return Sweep(config, asked(keep, **others), folder, resume=resume, command="atp train", engine=Here(say)).execute()


def losses(folder):
    records = map(json.loads, (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines())
    return [(record["step"], record["phase"], record["loss"]) for record in records]


@pytest.fixture(scope="module")
def swept(config, tmp_path_factory):
    """(config, folder, content) of a finished sweep with a tuned dense model."""
    settings = small(config, evaluation={"dense_baseline": True, "questions": 10})
    folder = tmp_path_factory.mktemp("swept") / "out"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("atp.inputs.promises.BUDGET_TOLERANCE", 0.02)
        return settings, folder, sweep(settings, [0.8, 0.6], folder)


@pytest.mark.parametrize("case", one_in_four(CASES))
def test_a_target_is_the_run_of_its_own_bit_for_bit(config, tmp_path, case, monkeypatch):
    settings, steps, said = small(config, *CASES[case], lora={"dropout": 0.1}), [], []
    step = trainers.open_step
    monkeypatch.setattr(trainers, "open_step", lambda *given: (steps.append(1), step(*given)))
    sweep(settings, [0.8, 0.6], tmp_path / "sweep", say=said.append)
    opened = settings.training.opened
    assert len(steps) == opened, "the open phase runs once for both targets"
    assert any("so each of them takes all steps itself" in line for line in said) == (not opened)
    start(settings, tmp_path / "alone", decisions={"target_keep": 0.6})
    ours, alone = tmp_path / "sweep" / "keep-0.6", tmp_path / "alone"
    assert results(ours) == results(alone)
    assert results(tmp_path / "sweep" / "keep-0.8") != results(alone)
    here, there = (read(folder, "summary.json") for folder in (ours, alone))
    for key in ("target_keep", "keep_decoder", "params_after", "perplexity", "qa", "data", "train_tokens"):
        assert here[key] == there[key], key
    assert losses(ours) == losses(alone)
    assert {path.name for path in alone.iterdir()} <= {path.name for path in ours.iterdir()}


TABLE = LatencyTable(
    attention=((0.5, 2.0), (1.0, 4.0)), mlp=((0.25, 1.0), (1.0, 7.0)), norms=0.5, outside=3.0, layers=2
)


@pytest.mark.slow
def test_a_target_in_any_unit_is_the_run_of_its_own_bit_for_bit(config, tmp_path, monkeypatch):
    """Two times of one kind come from one measurement, and a resumed sweep takes none anew."""
    timed = []
    monkeypatch.setattr(latency, "measure", lambda *given, decode: (timed.append(decode), TABLE)[1])
    settings, folder = small(config), tmp_path / "sweep"
    total = AutoModelForCausalLM.from_pretrained(config.model.path).num_parameters()
    targets = {
        "params": ("target_params", [round(0.7 * total)]),
        "megabytes": ("target_megabytes", [round(4e-6 * 0.8 * total, 4)]),
        "prefill_ms": ("target_prefill_ms", [20, 16]),
        "decode_ms": ("target_decode_ms", [18.5]),
    }
    with stopping_at(sweeps, "_begin", when=lambda shared, target, _: target.asked.text == "decode-ms 18.5"):
        sweep(settings, [], folder, **{option: values for option, (_, values) in targets.items()})
    assert timed == [False, True]
    content = sweep(settings, [], folder, resume=True, **{option: values for option, (_, values) in targets.items()})
    assert timed == [False, True, True], "the one that had no folder yet is measured for it"
    rows = {row["target"]: row for row in content["rows"] if row["model"] == "ATP"}
    assert len(rows) == 5 and len({row["parameters"] for row in rows.values()}) == 5
    for option, (key, values) in targets.items():
        for value in values:
            name = f"{option.replace('_', '-')}-{value}"
            start(settings, tmp_path / name, decisions={key: value})
            assert results(folder / name) == results(tmp_path / name), name
            here, there = (read(place / name, "summary.json") for place in (folder, tmp_path))
            for figure in ("target_keep", "keep_decoder", "params_after", "perplexity", "latency"):
                assert here.get(figure) == there.get(figure), (name, figure)
            assert there.get("latency") == (read(folder / name, "latency.json") if option.endswith("_ms") else None)
            assert losses(folder / name) == losses(tmp_path / name)
            assert rows[name.replace(f"-{value}", f" {value}")]["keep"] == there["target_keep"]


def test_results_of_a_sweep(swept):
    _, folder, content = swept
    assert content == read(folder, "sweep.json") and not content["missing"] and not content["notes"]
    rows = content["rows"]
    assert [(row["model"], row["target"], row["keep"]) for row in rows] == [
        ("original", None, 1.0), ("tuned, uncut", None, 1.0), ("ATP", "keep 0.8", 0.8), ("ATP", "keep 0.6", 0.6)
    ]  # fmt: skip
    for row in rows[2:]:
        summary = read(folder / f"keep-{row['keep']:g}", "summary.json")
        assert row["keep_decoder"] == summary["keep_decoder"] == pytest.approx(row["keep"], abs=0.02)
        assert (row["parameters"], row["megabytes"]) == (summary["params_after"], summary["megabytes"]["final"])
        interval = [row["perplexity low"], row["perplexity high"]]
        assert (row["perplexity"], interval) == (
            summary["perplexity"]["final"], summary["perplexity_interval"]["final"]
        )  # fmt: skip
        assert row["qa macro_f1"] == summary["qa"]["final"]["macro_f1"]
        assert row["masked_vs_cut"] == summary["certificate"]["masked_vs_cut"]
        own = summary["seconds"].keys() - {"total", "open", "saliency", "dense_lora"}
        assert row["seconds"] == pytest.approx(sum(summary["seconds"][phase] for phase in own), abs=0.1)
    assert content["shared"]["steps"] == 2
    assert {"open", "saliency", "dense_lora"} <= content["shared"]["seconds"].keys()
    with (folder / "sweep.csv").open(encoding="utf-8") as file:
        found = list(csv.DictReader(file))
    assert [(row["model"], float(row["perplexity"])) for row in found] == [(r["model"], r["perplexity"]) for r in rows]
    assert (folder / "sweep.png").read_bytes().startswith(b"\x89PNG")
    (head, sizes), (scored, scores) = tables(rows)
    assert head == ["model", "share of the decoder", "parameters", "MB", "certificate", "seconds"]
    assert scored[:2] == ["model", "perplexity"] and "of tuned dense" in scored
    assert sizes[0][-2:] == ["–", "–"] and sizes[3][0] == scores[3][0] == "keep 0.6" and "–" not in sizes[3]
    assert [line[0] for line in sizes] == ["original", "tuned, uncut", "keep 0.8", "keep 0.6"]
    assert {len(line) for line in sizes} == {len(head)} and {len(line) for line in scores} == {len(scored)}


def test_a_recommendation_follows_its_rule(swept, capsys):
    """On the sweep's own records, with the answers of its models replaced."""
    _, folder, content = swept
    found = content["recommended"]
    assert found == read(folder, "sweep.json")["recommended"] and found["least_kept"] == 0.95
    console = Console(width=200, file=io.StringIO())
    show(content, console)
    assert found["says"] in console.file.getvalue() and "of the best" in console.file.getvalue()
    truths = ["yes", "no"] * 30
    right = [[t, t] for t in truths]
    some_wrong = [[t, "no"] for t in truths[:6]] + right[6:]
    half = [[t, "yes"] for t in truths]

    def chosen(smaller, larger, dense=half, losses=(1.0, 1.0)):
        def final(answers, loss):
            return {"items": [[loss * n, n] for n in range(5, 25)], "tasks": {"qa": {"items": answers}}}

        others = {"original": final(half, 3.0), "tuned_dense": final(dense, 1.5)}
        others["majority"] = {"qa": {"label": "yes", "items": half}}
        scores = {
            "keep 0.8": others | {"final": final(larger, losses[0])},
            "keep 0.6": others | {"final": final(smaller, losses[1])},
        }
        rows = [dict(row) for row in content["rows"]]
        return recommend(rows, scores, ["qa"], 0), {row["target"] or row["model"]: row["of the best"] for row in rows}

    for answers, target in (
        ((right, right), "keep 0.6"),
        ((some_wrong, right), "keep 0.8"),
        ((half, right), "keep 0.8"),
    ):
        found, kept = chosen(*answers)
        assert (found["target"], found["score"]) == (target, "qa macro_f1") and kept["keep 0.8"] == 1.0
    found, kept = chosen(half, half, dense=right)
    assert found["target"] is None and found["best"] == "tuned, uncut" and kept["keep 0.6"] == pytest.approx(1 / 3)
    assert found["says"].startswith("no target is recommended: none keeps at least 95% of the best qa macro-f1")
    found, kept = chosen(half, half, losses=(1.0, 1.04))  # nothing is measured but perplexity
    assert (found["target"], found["score"]) == ("keep 0.6", "perplexity")
    assert kept["keep 0.6"] == pytest.approx(math.exp(-0.04))
    assert chosen(half, half, losses=(1.0, 1.06))[0]["target"] == "keep 0.8"


def test_the_printed_tables_fit_a_narrow_terminal(swept):
    """With long names and two tasks: no cell is cut short, which rich shows by an ellipsis."""
    _, _, content = swept
    last = content["rows"][-1]
    second = {name.replace("qa ", "second "): value for name, value in last.items() if name.startswith("qa ")}
    rows = [row | second for row in (*content["rows"], last | {"target": "params 110000000"})]
    out = io.StringIO()
    show(content | {"rows": rows}, Console(width=80, file=out))
    assert "params 110000000" in out.getvalue() and "…" not in out.getvalue()
    for row in rows:
        assert f"{row['parameters']:,}" in out.getvalue() and f"{row['perplexity']:.2f}" in out.getvalue()


STOPS = {
    "in the shared open phase": (SharedRun, "_train", lambda self, trainer: True),
    "after the shared open phase": (SharedRun, "_train", lambda self, trainer: True),
    "before the second target": (sweeps, "_begin", lambda shared, target, _: target.config.output_dir.endswith("0.6")),
    "in the second target": (Run, "_conclude", lambda self, *_: self.config.output_dir.endswith("0.6")),
}


@pytest.mark.parametrize("stop", one_in_four(STOPS))
def test_an_interrupted_sweep_resumes_and_leaves_finished_targets_alone(config, tmp_path, monkeypatch, stop):
    settings, folder = small(config), tmp_path / "out"
    torchrun = stop == "before the second target"  # which starts its processes again
    if torchrun:
        monkeypatch.setenv("TORCHELASTIC_RUN_ID", "launch")
    where, name, when = STOPS[stop]
    with stopping_at(where, name, when=when, after=stop.startswith("after")):
        sweep(settings, [0.8, 0.6], folder)
    done = everything(folder / "keep-0.8")
    content = sweep(settings, [0.8, 0.6], folder, resume=not torchrun)
    assert not done or everything(folder / "keep-0.8") == done
    assert [row["keep"] for row in content["rows"]] == [1.0, 0.8, 0.6]
    start(settings, tmp_path / "alone", decisions={"target_keep": 0.6})
    assert results(folder / "keep-0.6") == results(tmp_path / "alone")


def test_a_target_is_added_on_resume_without_another_open_phase(swept, tmp_path, monkeypatch):
    settings, folder, _ = swept
    before = everything(folder / "keep-0.8") | everything(folder / "shared")
    monkeypatch.setattr(trainers, "open_step", lambda *given: pytest.fail("the open phase is there"))
    content = sweep(settings, [0.7, 0.8], folder, resume=True)
    assert [row["keep"] for row in content["rows"]] == [1.0, 1.0, 0.7, 0.8]
    assert everything(folder / "keep-0.8") | everything(folder / "shared") == before


def test_a_broken_promise_is_told_at_the_end_and_its_row_stays(config, tmp_path, monkeypatch):
    def miss(summary):
        if summary["target_keep"] == 0.8:
            raise NotReached("budget: missed")

    monkeypatch.setattr("atp.run.check_promises", miss)
    with pytest.raises(NotReached, match=r"^keep 0.8: budget: missed$"):
        sweep(small(config), [0.8, 0.6], tmp_path / "out")
    content = read(tmp_path / "out", "sweep.json")
    assert [row["keep"] for row in content["rows"]] == [1.0, 0.8, 0.6] and content["notes"] == {
        "keep 0.8": "budget: missed"
    }


# What is refused


def test_all_targets_are_checked_before_anything_is_written(config, tmp_path):
    with pytest.raises(InputError, match=r"decisions.target_keep is 0.001, but the nearest share"):
        sweep(small(config), [0.8, 0.001], tmp_path / "out")
    assert not (tmp_path / "out").exists()
    with pytest.raises(InputError, match="cannot load the model from"):
        sweep(small(config, model={"path": str(tmp_path / "none")}), [0.8], tmp_path / "out")
    with pytest.raises(InputError, match=r"decisions.target_params is 7, but the model has .* choose a number between"):
        sweep(small(config), [0.8], tmp_path / "out", params=[7])
    with pytest.raises(InputError, match=r"data.jsonl does not exist"):
        sweep(small(config, data={"train": str(tmp_path / "data.jsonl")}), [0.8], tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_targets_that_are_none_are_one_sentence(config, tmp_path):
    keep, params, megabytes, prefill, _ = UNITS
    assert [one.value for one in keep.parse("0.8, 0.65,")] == [0.8, 0.65]
    assert [one.value for one in params.parse("90M,1.5B, 7k,123,1e6")] == [90_000_000, 1_500_000_000, 7000, 123, 10**6]
    assert [one.folder for one in params.parse("90M") + megabytes.parse("180.0,0.5")] == [
        "params-90000000", "megabytes-180", "megabytes-0.5"
    ]  # fmt: skip
    for unit, texts in (
        (keep, ("0.8,half", "1", "0", "-0.5", "nan", "80%", "0.5M")),
        (params, ("many", "0", "0.2", "-5", "90 M", "1.2.3M", "inf", "90m")),
        (megabytes, ("180M", "big", "0")),
        (prefill, ("soon", "0", "-3")),
    ):
        for text in texts:
            with pytest.raises(InputError, match=rf"^--{unit.option} '.*' is no {unit.what}: use for example --"):
                unit.parse(text)
        assert len(unit.parse(unit.example)) == 2
    for keep, other, message in (
        ([0.8, 0.6, "0.80"], {}, "--keep names 0.8 twice"),
        ([], {"params": ["1k", 1000]}, "--params names 1000 twice"),
        ([], {}, "nothing to sweep over"),
    ):
        with pytest.raises(InputError, match=message):
            Sweep(config, asked(keep, **other), tmp_path, resume=False, command="")


@pytest.mark.parametrize(
    ("options", "found"),
    [
        ("--params 90M,70M --decode-ms 20", ["params 90000000", "params 70000000", "decode-ms 20"]),
        ("--keep 0.9 --megabytes 180.5 --prefill-ms 50,40",
         ["keep 0.9", "megabytes 180.5", "prefill-ms 50", "prefill-ms 40"]),
        ("", ["keep 0.8", "keep 0.7", "keep 0.6", "keep 0.5"]),
    ],
)  # fmt: skip
def test_the_command_takes_lists_in_any_units(config, tmp_path, monkeypatch, atp, options, found):
    seen = []

    def stop(settings, asked, folder, **rest):
        seen.append([one.text for one in asked])
        raise InputError("that is all")

    monkeypatch.setattr("atp.studies.sweep.Sweep", stop)
    (tmp_path / "config.yaml").write_text(config.dump(), encoding="utf-8")
    code, _, err = atp("sweep", tmp_path / "config.yaml", *options.split())
    assert code == 2 and err == "error: that is all\n" and seen == [found]
    code, _, err = atp("sweep", tmp_path / "config.yaml", "--params", ",")
    assert code == 2 and "nothing to sweep over: give at least one target" in err


def test_the_targets_of_the_config_give_way(config, tmp_path):
    params = small(config, decisions={"target_keep": 0.6, "target_params": None})
    params = params.model_copy(update={"decisions": params.decisions.model_copy(update={"target_params": 10**9})})
    (target,) = targets_of(params, asked([0.7]), tmp_path)
    assert target.given == target.config
    assert target.config.decisions.target_keep == 0.7 and target.config.decisions.target_params is None


def test_another_config_or_folder_is_not_resumed(swept, tmp_path):
    settings, folder, _ = swept
    with pytest.raises(InputError, match="output_dir .* is not empty"):
        sweep(settings, [0.8], folder)
    other = settings.model_copy(update={"lora": settings.lora.model_copy(update={"r": 4})})
    with pytest.raises(InputError, match=r"cannot resume under a changed config \(lora.r: 16 -> 4\)"):
        sweep(other, [0.8], folder, resume=True)
    (tmp_path / "thesis.txt").write_text("precious")
    with pytest.raises(InputError, match="it has no readable sweep.yaml"):
        sweep(settings, [0.8], tmp_path, resume=True)


def test_only_a_checkpoint_from_before_the_decisions_takes_another_target(swept, tmp_path):
    settings, folder, _ = swept
    shared = checkpoints.load(checkpoints.newest(folder / "shared" / "checkpoints"))
    values = shared.meta["config"]
    other = type(settings).parse(values, ["decisions.target_keep=0.3", f"output_dir={tmp_path}"])
    found = for_target(shared, other)
    assert found.meta["config"] == other.model_dump(mode="json") and shared.meta["config"] == values
    assert all(torch.equal(found.tensors[name], tensor) for name, tensor in shared.tensors.items())
    with pytest.raises(InputError, match=r"cannot resume under a changed config \(training.lr"):
        for_target(shared, type(settings).parse(values, ["training.lr=0.1"]))
    cut = checkpoints.load(checkpoints.newest(folder / "keep-0.8" / "checkpoints"))
    with pytest.raises(InputError, match="of step 4 holds decisions for a target: start .* which ends at step 2"):
        for_target(cut, other)


def test_a_lost_checkpoint_is_one_sentence(swept, tmp_path):
    settings, folder, _ = swept
    place = folder / "shared" / "checkpoints"
    hidden = place.rename(tmp_path / "hidden")
    try:
        with pytest.raises(InputError, match=r"checkpoints holds no checkpoint: remove .*shared.json and repeat"):
            sweep(settings, [0.75], folder, resume=True)
    finally:
        hidden.rename(place)
    assert not (folder / "keep-0.75").exists()
