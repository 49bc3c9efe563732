"""What is known before the first step, refused or said, and what a finished run must have kept."""

import copy
import math
from pathlib import Path

import pytest
from tiny_command import start, stopping_at
from tiny_inputs import changed

from atp.config import ATPConfig
from atp.data.batches import IGNORE
from atp.ground.errors import InputError, NotReached
from atp.inputs.checks import check_reachable, few_scored, recipe, rereads, run_remarks, shortfalls, steps_per_epoch
from atp.inputs.folders import refuse_inputs_inside
from atp.inputs.loading import load_data, load_model, load_shapes, load_tokenizer
from atp.inputs.promises import check_promises
from atp.inputs.resolve import resolve
from atp.run import Run
from atp.training.trainer import ATPTrainer


@pytest.fixture(scope="module")
def model(config):
    return load_model(config.model, config.decisions.space)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["decisions.target_keep=0.01"], "target_keep is 0.01, but the nearest share .* of this model can keep is 0.1"),
        (["decisions.multiples.mlp=100000"], r"keep with decisions.multiples {'mlp': 100000} is 0.8\d+: choose"),
        (["decisions.multiples.kv_group=2", "decisions.multiples.mlp=50"], "or lower the multiples"),
        (["decisions.source=learned", "training.search=0"], "training.search is 0, so nothing can be learned: set it"),
        (["decisions.source=running", "training.search=0"], "decisions.source=running watches open and search steps"),
        (["data.length=4096"], "data.length is 4096, but the model has only 2048 positions"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_written(config, model, tmp_path, overrides, message):
    check_reachable(config, model.config)
    config = changed(config, *overrides, f"output_dir={tmp_path / 'run'}", "training.batch_size=1")
    with pytest.raises(InputError, match=message):
        check_reachable(config, model.config)
    with pytest.raises(InputError, match=message):
        Run(config, resume=False, command="").execute()
    with pytest.raises(InputError, match=message):
        ATPTrainer.from_config(config)
    assert not list(tmp_path.iterdir())


def test_what_falls_short_is_said(config):
    few = changed(config, "evaluation.windows=2", "evaluation.questions=2", "decisions.refit_windows=0")
    tokenizer = load_tokenizer(few.model)
    assert shortfalls(resolve(few), load_data(few, tokenizer)) == []
    many = changed(
        config, "evaluation.windows=200", "evaluation.questions=300", "decisions.refit_windows=400",
        "decisions.saliency_windows=500", "data.labels=[yes, no, maybe]", "evaluation.answers=true",
    )  # fmt: skip
    data = load_data(many, tokenizer)
    assert shortfalls(resolve(many), data) == [
        f"evaluation.windows is 200, but there are only {len(data.test)} test windows",
        f"decisions.refit_windows is 400, but there are only {len(data.calibration)} calibration samples",
        f"decisions.saliency_windows is 500, but there are only {len(data.calibration)} calibration samples",
        "evaluation.questions is 300, but there are only 12 test examples of qa",
        "no test example has the label maybe of data.labels",
    ]


def test_steps_on_few_tokens_with_a_loss_are_said_unless_the_rate_is_low(config):
    data = load_data(config, load_tokenizer(config.model))
    scored = sum((data.train[row]["labels"][1:] != IGNORE).sum() for row in range(len(data.train))) / len(data.train)
    one = changed(config, "training.batch_size=1")
    (said,) = few_scored(one, data, 1)
    assert said.startswith(f"a step learns from {scored:.0f} tokens on average, ") and "training.lr=0.005" in said
    needed = math.ceil(32 / scored.item())
    assert f"leave out training.lr, or set training.batch_size={needed}" in said
    assert said in run_remarks(one, resolve(one), load_shapes(one.model), data)
    assert few_scored(changed(one, "training.lr=0.001"), data, 1) == []
    assert few_scored(changed(one, f"training.batch_size={needed}"), data, 1) == []
    assert few_scored(changed(one, f"training.gradient_accumulation={needed}"), data, 1) == []
    assert few_scored(one, data, needed) == []
    (shared,) = few_scored(one, data, 2)
    assert shared.endswith(f"set training.batch_size={math.ceil(16 / scored.item())}")
    free = changed(one, "training.lr=null")
    said = f"a step learns from {scored:.0f} tokens on average, fewer than 32, so training.lr is "
    said += f"{2e-3 * math.sqrt(scored.item() / 32):.2g}"
    assert few_scored(free, data, 1) == [f"{said} and training.update_clipping is true"], "what nobody set"
    assert few_scored(changed(free, "training.update_clipping=false"), data, 1) == [said]


def test_samples_that_are_read_often_are_said_unless_the_best_adapter_stays(config):
    data = load_data(config, load_tokenizer(config.model))
    twice = 2 * len(data.train) // config.training.batch_size
    training = config.training.model_copy(update={"search": 0, "settle": 0, "open": 0, "tune": twice})
    fixed = config.model_copy(update={"training": training})
    assert rereads(fixed, steps_per_epoch(fixed, len(data.train), 1)) == []
    often, epoch = changed(fixed, f"training.tune={10 * twice}"), steps_per_epoch(fixed, len(data.train), 2)
    (said,) = rereads(often, epoch)
    assert said.startswith("each training sample is read 40.0 times, ")
    assert f"set evaluation.every={twice // 2} training.keep_best=true" in said
    alone = run_remarks(often, resolve(often), load_shapes(often.model), data)
    assert said not in alone and any("is read 20.0 times" in line for line in alone)
    (said,) = rereads(changed(often, "evaluation.every=5"), epoch)
    assert "or set training.keep_best=true to end" in said
    assert rereads(changed(often, "evaluation.every=5", "training.keep_best=true"), epoch) == []


@pytest.mark.parametrize(("settings", "said"), [
    ({"preset": "thorough", "training": {"steps": 400}}, "preset thorough is for 3600 steps, and this run takes 400: "),
    ({"preset": "thorough", "training": {"steps": 1800}}, None),
    ({"preset": "standard", "training": {"minutes": 3}}, "preset standard is for 1200 steps, and this run takes 400: "),
    ({"preset": "auto", "training": {"steps": 4000}}, None),
    ({"training": {"open": 0}}, "decisions.source=tuned judges the model before any tuning, since training.open is 0"),
    ({"training": {"open": 0, "search": 40}}, None),
    ({"training": {"open": 0}, "decisions": {"source": "static"}}, None),
    ({"preset": "paper"}, None),
    ({}, None),
])  # fmt: skip
def test_settings_that_take_away_what_another_is_for_are_said(settings, said):
    asked = ATPConfig.parse({"model": {"path": "m"}, "output_dir": "o"} | settings)
    found = recipe(resolve(asked, steps=asked.training.total))
    assert len(found) == (said is not None) and all(line.startswith(said) for line in found), found


@pytest.mark.parametrize("packing", ["joined", "padded"])
def test_samples_longer_than_a_window_are_told(config, tmp_path, packing):
    rows = [f'{{"text": "the heart rate {n} {"fell " * (20 if n % 3 else 5)}"}}' for n in range(60)]
    (tmp_path / "a.jsonl").write_text("\n".join(rows), encoding="utf-8")
    long = changed(config, f"data.train={tmp_path / 'a.jsonl'}", "data.labels=[]", f"data.packing={packing}")
    data = load_data(long, load_tokenizer(long.model))
    cut = sum(len(example.text.split()) + 1 > 16 for example in data.splits.train)
    assert 0 < cut < len(data.splits.train)
    if packing == "joined":
        sentence = f"; {cut} train samples are longer than data.length (16 tokens) and span several windows"
        assert data.splits.description.endswith(sentence)
    else:
        samples = f"{cut} of {len(data.splits.train)} training samples"
        sentence = f"{samples} are longer than data.length=16 and lose their beginning: raise it"
        assert sentence in shortfalls(long, data)
    short = changed(long, "data.length=64")
    data = load_data(short, load_tokenizer(long.model))
    assert "data.length" not in data.splits.description + " ".join(shortfalls(short, data))


def test_a_shown_question_needs_a_task_with_labels(config):
    tokenizer = load_tokenizer(config.model)
    sentence = "evaluation.answers is true, but no task with labels is scored"
    for overrides in (["evaluation.questions=0"], ["data.labels=[]"]):
        unlabelled = changed(config, *overrides)
        assert sentence not in shortfalls(unlabelled, load_data(unlabelled, tokenizer))
        asked = changed(unlabelled, "evaluation.answers=true")
        assert sentence in shortfalls(asked, load_data(asked, tokenizer))


def test_skipped_rows_are_shown_and_listed(config, tmp_path):
    good = Path(config.data.train).read_text(encoding="utf-8").splitlines()
    bad = ["{", '{"prompt": "the"}', *(f'{{"prompt": "the {n}", "completion": " maybe"}}' for n in range(12))]
    (tmp_path / "data.jsonl").write_text("\n".join(good + bad), encoding="utf-8")
    options = {"data": {"train": str(tmp_path / "data.jsonl"), "on_error": "skip"}}
    said = []
    with stopping_at(Run, "_score"):
        start(config, tmp_path / "out", say=said.append, **options)
    assert said[0].endswith("; 14 rows skipped")
    assert said[1].startswith("skipped: ") and "data.jsonl, line 61: not valid JSON" in said[1]
    assert sum(line.startswith("skipped: ") for line in said) == 10 and said[11] == "and 4 more"
    listed = (tmp_path / "out" / "skipped_rows.txt").read_text(encoding="utf-8").splitlines()
    assert len(listed) == 14 and "line 74: label 'maybe' is not one of yes, no; correct the row" in listed[-1]
    with pytest.raises(InputError, match="line 61: not valid JSON"):
        start(config, tmp_path / "other", data=options["data"] | {"on_error": "stop"})
    assert not (tmp_path / "other").exists()


def test_every_source_is_kept_from_the_runs_own_folders(config, tmp_path):
    inside = tmp_path / "model" / "a.jsonl"
    inside.parent.mkdir()
    inside.touch()
    for given in ({config.data.train: 2, str(inside): 1}, [config.data.train, str(inside)]):
        data = config.data.model_copy(update={"train": given})
        with pytest.raises(InputError, match="^data.train .*a.jsonl lies in"):
            refuse_inputs_inside(config.model_copy(update={"data": data}), tmp_path)


# fmt: off
KEPT = {
    "certificate": {"masked_vs_cut": 3e-7, "cut_vs_reloaded": 0.0, "removed_lora_norm": 0.0, "merge_error": 0.9,
                    "rounding_gap": 2e-7, "dtype": "float32"},
    "keep_decoder": 0.6001,
    "target_keep": 0.6,
    "perplexity": {"original": 20.0, "final": 15.0},
    "speed": {"final": {"prefill_tokens_per_second": 1000.0}},
    "train_tokens_per_second": {"tune": 500.0},
    "qa": {"final": {"accuracy": 0.5, "accuracy_interval": [0.4, 0.6]}},
}
# fmt: on


def with_value(path, value):
    changed = copy.deepcopy(KEPT)
    *parents, last = path
    place = changed
    for key in parents:
        place = place[key]
    place[last] = value
    return changed


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize(
    "path",
    [
        ("certificate", "masked_vs_cut"), ("certificate", "cut_vs_reloaded"), ("certificate", "removed_lora_norm"),
        ("certificate", "merge_error"), ("certificate", "rounding_gap"),
        ("keep_decoder",), ("perplexity", "final"), ("perplexity", "original"),
        ("speed", "final", "prefill_tokens_per_second"), ("train_tokens_per_second", "tune"),
        ("qa", "final", "accuracy_interval", 1),
    ],
)  # fmt: skip
def test_no_figure_passes_that_is_not_finite(path, value):
    with pytest.raises(NotReached, match=str(path[-2] if isinstance(path[-1], int) else path[-1])):
        check_promises(with_value(path, value))


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("certificate", "masked_vs_cut"), 0.01), (("certificate", "cut_vs_reloaded"), 0.01),
        (("certificate", "merge_error"), 1.5),
        (("certificate", "removed_lora_norm"), 1e-9), (("keep_decoder",), 0.61), (("keep_decoder",), 0.59),
    ],
)  # fmt: skip
def test_a_missed_promise_is_named(path, value):
    check_promises(KEPT)
    with pytest.raises(NotReached, match="budget" if path == ("keep_decoder",) else path[-1]):
        check_promises(with_value(path, value))
