"""`atp config`: what the keys are, what a config resolves to, and what the presets set."""

import json
import sys

import pytest
import yaml

from atp.cli.cli import main
from atp.config import ATPConfig
from atp.config.presets import PRESETS
from atp.inputs.resolve import resolve


@pytest.fixture
def atp(monkeypatch, capsys):
    """Runs `atp config` in this process: (exit code, stdout, stderr)."""

    def run(*words):
        monkeypatch.setattr(sys, "argv", ["atp", "config", *words])
        with pytest.raises(SystemExit) as done:
            main()
        return done.value.code, *capsys.readouterr()

    return run


def sections(schema):
    """(dotted key, its schema) of all keys that hold a value."""

    def walk(properties, prefix):
        for name, field in properties.items():
            section = schema["$defs"].get(field.get("$ref", "").rpartition("/")[2])
            if section is None:
                yield prefix + name, field
            else:
                yield from walk(section["properties"], f"{prefix}{name}.")

    return dict(walk(schema["properties"], ""))


def test_the_schema_gives_every_key_with_meaning_and_range(atp):
    code, shown, _ = atp("schema")
    found = sections(json.loads(shown))
    assert code == 0 and json.loads(shown)["$schema"].startswith("https://json-schema.org/")
    assert found["lora.alpha"]["exclusiveMinimum"] == 0 and found["lora.alpha"]["default"] == 32.0
    assert found["training.schedule"]["enum"] == ["constant", "linear", "cosine"]
    assert [key for key, field in found.items() if not field.get("description")] == [], "each key says what it is"


def test_show_prints_what_a_run_would_take(atp):
    code, shown, _ = atp("show", "examples/health-mini.yaml", "preset=paper", "training.lr=0.5")
    asked = ATPConfig.load("examples/health-mini.yaml", ["preset=paper", "training.lr=0.5"])
    assert code == 0 and yaml.safe_load(shown) == resolve(asked).model_dump(mode="json")
    assert resolve(ATPConfig.parse(yaml.safe_load(shown))) == resolve(asked), "and can be used in its place"


def test_show_names_what_only_a_run_can_know(atp):
    code, shown, _ = atp("show", "examples/health-mini.yaml", "training.minutes=3", "decisions.target_decode_ms=9")
    first, rest = shown.split("\n", 1)
    assert code == 0 and first.endswith(
        ": decisions.target_decode_ms, training.minutes, training.lr, training.update_clipping"
    )
    values = yaml.safe_load(rest)
    assert values["training"]["minutes"] == 3 and values["training"]["precision"] in ("float32", "bfloat16")


def test_a_wrong_key_is_told_as_by_train(atp):
    code, shown, told = atp("show", "examples/health-mini.yaml", "training.learning_rate=1")
    assert (code, shown) == (2, "") and "did you mean 'lr'?" in told


def test_presets_are_shown_whole(atp):
    code, shown, _ = atp("presets")
    assert code == 0
    listed = yaml.safe_load(shown)
    by_steps = "the defaults; from 400 steps on quick; from 1000 steps on standard; from 3000 steps on thorough"
    assert listed.pop("auto") == by_steps and listed == PRESETS


def test_alone_it_shows_its_help(atp):
    code, _, told = atp()
    assert code == 2 and "schema" in told


def test_a_secret_in_a_config_is_not_shown(atp, tmp_path):
    config = tmp_path / "a.yaml"
    config.write_text("model: {path: m}\noutput_dir: runs/hf_" + "a" * 30, encoding="utf-8")
    assert "runs/***" in atp("show", str(config))[1]
