"""Minutes and tokens in place of steps: what they come to, how phases share them, and that a resumed run keeps them."""

import dataclasses
import json
from pathlib import Path

import pytest
import yaml
from tiny_inputs import tiny_config

from atp.config import ATPConfig
from atp.config.presets import PRESETS
from atp.ground.errors import InputError
from atp.inputs.resolve import resolve
from atp.plan import length, make_plan
from atp.plan.cost import Flops
from atp.plan.length import measured_length
from atp.run import Run
from atp.training.resume import begun
from atp.training.schedule import Phases


def config_of(preset="quick", **training):
    return ATPConfig.parse({"model": {"path": "m"}, "output_dir": "o", "preset": preset, "training": training})


def resolved(config, sample=100.0, scored=1.0):
    """The config of a run with samples of so many tokens, and what was found of its length."""
    record = measured_length(config, sample, scored)
    return resolve(config, steps=record and record["steps"]), record


def phases(config, sample=100.0):
    found, record = resolved(config, sample)
    assert found.training.budget == {} and f"comes to {found.training.total} steps" in record["description"]
    return Phases.from_config(found.training)


def test_tokens_are_those_that_all_steps_read_and_phases_keep_their_shares():
    found, record = resolved(config_of(tokens=2e6, batch_size=2, gradient_accumulation=5))
    assert found.training.total == 2000 and Phases.from_config(found.training).open == round(2000 / 3)
    told = "training.tokens=2e+06 comes to 2000 steps (1,000 tokens per step), 2,000,000 tokens"
    assert record["description"] == told
    assert phases(config_of(tokens=120_000, open=30, search=60, settle=10, tune=100)) == Phases(360, 60, 600, 180)
    assert phases(config_of(tokens=60_000, search=100)) == Phases(150, 0, 250, 200), "of 400, a third of them open"
    paper = phases(config_of("paper", tokens=20 * 100 * 300))
    assert (paper.open, paper.search, paper.settle, paper.tune) == (0, 150, 10, 140)
    few = phases(config_of(tokens=1000, open=30, search=600, settle=1, tune=0))
    assert few.settle == 1 and few.tune == 0 and few.open >= 1, "a phase that there is stays"


@pytest.mark.parametrize(
    ("training", "message"),
    [
        ({"tokens": 1e6, "steps": 300}, "steps and tokens are one length in different units: give one of them"),
        ({"minutes": 1, "steps": 300}, "steps and minutes are one length in different units"),
        ({"minutes": 1, "tokens": 1e6}, "minutes and tokens are one length in different units"),
        ({"minutes": 0}, "input should be greater than 0"),
        ({"preset": "thorough", "tokens": 1e6, "steps": 10}, "one length"),
    ],
)
def test_two_lengths_are_refused(training, message):
    with pytest.raises(InputError, match=message):
        config_of(**training)


def test_steps_of_a_preset_give_way_auto_leaves_given_phases_and_too_little_is_refused():
    assert config_of("thorough", tokens=1e6).training.budget == {"tokens": 1e6}
    assert config_of("thorough").training.total > config_of("standard").training.total > config_of().training.total
    found = config_of("auto", open=1000, tune=4000)
    assert found.training.lr is None and found.evaluation.every is None and found.decisions.refit_windows == 96
    with pytest.raises(InputError, match="training.tokens is 500, which comes to 5 steps .*: give more"):
        resolved(config_of(tokens=500))
    with pytest.raises(InputError, match="training.minutes is turned into steps by `atp train` and `atp plan` only"):
        Phases.from_config(config_of(minutes=3).training)


@pytest.mark.parametrize(("steps", "every", "lr", "windows"), [
    (399, None, None, 96), (400, None, None, 192), (999, None, None, 192), (1000, 100, None, 192),
    (2999, 100, None, 192), (3000, 200, 7e-4, 192), (50_000, 200, 7e-4, 192),
])  # fmt: skip
@pytest.mark.parametrize("unit", ["steps", "tokens"])
def test_auto_goes_by_the_number_of_steps(steps, every, lr, windows, unit):
    length = {unit: steps * (100 if unit == "tokens" else 1)}
    found = resolved(config_of("auto", **length))[0]
    assert found.training.total == steps and found.preset == "auto"
    assert (found.evaluation.every, found.training.keep_best) == (every, every is not None)
    assert (found.training.lr, found.decisions.refit_windows) == (lr, windows)
    named = resolved(config_of("quick", **length))[0]
    assert (named.evaluation.every, named.training.lr, named.decisions.refit_windows) == (None, None, 192)


@pytest.mark.parametrize("unit", ["steps", "tokens"])
def test_settings_that_are_given_stand_above_auto_s(unit):
    values = {"model": {"path": "m"}, "output_dir": "o", "training": {unit: 400_000, "lr": 1e-3}}
    found = resolved(ATPConfig.parse(values | {"decisions": {"refit_windows": 0}}))[0]
    assert (found.training.lr, found.decisions.refit_windows) == (1e-3, 0)
    assert found.training.keep_best and found.evaluation.every == 200
    found = resolved(ATPConfig.parse(values | {"evaluation": {"every": None}}))[0]
    assert (found.training.keep_best, found.evaluation.every) == (False, None)
    found = resolved(ATPConfig.parse(values | {"evaluation": {"every": 7}}))[0]
    assert (found.training.keep_best, found.evaluation.every) == (True, 7)
    again = type(found).model_validate(found.model_dump(mode="json"))
    assert again == found, "as a run reads it back"


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    folder = tmp_path_factory.mktemp("length")
    config = tiny_config(folder)
    values = config.model_dump(mode="json") | {"output_dir": str(folder / "run")}
    values["training"] |= {"tokens": 700}
    values["evaluation"]["dense_baseline"] = False
    config = ATPConfig.parse(values)
    Run(config, resume=False, command="atp train", say=lambda line: None).execute()
    return config


def test_a_run_reads_the_tokens_that_were_asked_for_and_goes_on_with_its_steps(tiny):
    run = Path(tiny.output_dir)
    record = json.loads((run / "length.json").read_text(encoding="utf-8"))
    lines = (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line)["step"] for line in lines] == list(range(1, record["steps"] + 1))
    assert record["steps"] == round(700 / (2 * 16)) and record["asked"] == {"tokens": 700}
    assert json.loads((run / "summary.json").read_text(encoding="utf-8"))["train_tokens"] == record["steps"] * 32
    names = ("config.yaml", "resolved.yaml")
    asked, used = (yaml.safe_load((run / name).read_text(encoding="utf-8"))["training"] for name in names)
    assert (asked["tokens"], used["tokens"], used["steps"]) == (700, None, record["steps"])
    # No probe, no other number: the folder says what the steps are.
    before = (run / "summary.json").read_bytes()
    Run(tiny, resume=True, command="atp train", say=lambda line: None).execute()
    assert (run / "summary.json").read_bytes() == before
    assert begun(tiny).training.total == 22
    other = tiny.model_copy(update={"training": tiny.training.model_copy(update={"tokens": 900.0})})
    assert begun(other) is None
    with pytest.raises(InputError, match="cannot resume under a changed config .*tokens"):
        Run(other, resume=True, command="atp train", say=lambda line: None).execute()


def test_a_run_whose_tokens_come_to_many_steps_has_a_validation_split(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr("atp.config.presets._BY_STEPS", ((10, "standard"),))
    monkeypatch.setitem(PRESETS["standard"], "evaluation", {"every": 9})
    values = tiny.model_dump(mode="json", exclude_unset=True) | {"preset": "auto", "output_dir": str(tmp_path / "run")}
    values["training"] = {
        key: value for key, value in values["training"].items() if key not in ("keep_best", "tune", "steps")
    } | {"tokens": 700, "open": 4, "search": 0, "settle": 0}
    values["evaluation"].pop("every", None)
    values["decisions"] |= {"source": "tuned"}
    config = ATPConfig.parse(values)
    plan = make_plan(config)
    assert plan["data"]["windows"]["validation"] and any(row["phase"] == "validation" for row in plan["cost"])
    Run(config, resume=False, command="atp train", say=lambda line: None).execute()
    summary = json.loads((tmp_path / "run" / "summary.json").read_text(encoding="utf-8"))
    assert summary["validation"]["last_step"] == 22 and "validation" in summary["data"]


def test_minutes_are_what_the_probe_says(tiny, tmp_path, monkeypatch):
    """Twice the speed gives twice the steps, once what takes its time beside them is off."""
    speeds = dict.fromkeys((field.name for field in dataclasses.fields(Flops)), 1e7)
    monkeypatch.setattr(length, "flop_rates", lambda job: Flops(**speeds))

    def at(minutes):
        training = tiny.training.model_copy(update={"tokens": None, "minutes": minutes})
        return tiny.model_copy(update={"training": training, "output_dir": str(tmp_path)})

    fixed, each = length._seconds(resolve(at(1), steps=1000), 32.0, 0.5)
    steps = resolved(at(1), 32.0, 0.5)[0].training.total
    assert steps == int((60 - fixed) / each) >= 10 and fixed > 0
    speeds = {kind: 2 * speed for kind, speed in speeds.items()}
    assert resolved(at(1), 32.0, 0.5)[0].training.total == pytest.approx((120 - fixed) / each, abs=1)
    with pytest.raises(InputError, match="training.minutes is .*, which comes to 0 steps"):
        resolved(at(fixed / 3 / 60), 32.0, 0.5)


def at_steps(config):
    return lambda steps: resolve(config, steps=steps)


@pytest.mark.parametrize(("minutes", "steps", "asked"), [(5, 290, 1), (1, 30, 2), (0.4, -6, 2)])
def test_few_steps_are_those_of_a_run_that_measures_its_saliency(monkeypatch, minutes, steps, asked):
    probed = []

    def seconds(config, sample, scored, calibrated, found):
        probed.append(config.decisions.source)
        return {"running": 10.0, "tuned": 30.0}[config.decisions.source], 1.0

    monkeypatch.setattr(length, "_seconds", seconds)
    assert length._steps_in(60.0 * minutes, at_steps(config_of()), 100.0, 1.0)[0] == steps
    assert probed == ["running", "tuned"][:asked]


@pytest.mark.parametrize(("seconds", "steps"), [(300, 290), (420, 399), (490, 405)])
def test_a_longer_recipe_is_taken_only_where_its_time_is_left(monkeypatch, seconds, steps):
    """From 400 steps on the refit reads more windows: 410 steps with fewer would fit, and with more 335."""

    def times(config, sample, scored, calibrated, found):
        return {96: 10.0, 192: 85.0}[config.decisions.refit_windows], 1.0

    monkeypatch.setattr(length, "_seconds", times)
    assert length._steps_in(seconds, at_steps(config_of("auto", minutes=1)), 100.0, 1.0)[0] == steps


def test_the_plan_says_what_it_comes_to(tiny, tmp_path):
    plan = make_plan(tiny.model_copy(update={"output_dir": str(tmp_path)}))
    assert plan["remarks"][0] == "training.tokens=700 comes to 22 steps (32 tokens per step), 704 tokens."
    assert sum(row["steps"] for row in plan["cost"]) == 22
    assert plan["data"]["epochs"] == pytest.approx(22 / plan["data"]["steps_per_epoch"])
    longer = tiny.training.model_copy(update={"tokens": 70_000})
    plan = make_plan(tiny.model_copy(update={"output_dir": str(tmp_path), "training": longer}))
    assert f"is read {plan['data']['epochs']:.1f} times" in plan["data"]["shortfalls"][-1]
