"""`atp config`: what the keys are, what a config resolves to, and what the presets set."""

import json

import yaml

from atp.config import ATPConfig
from atp.config.presets import PRESETS
from atp.inputs.resolve import resolve


def sections(schema):
    def walk(properties, prefix):
        for name, field in properties.items():
            section = schema["$defs"].get(field.get("$ref", "").rpartition("/")[2])
            if section is None:
                yield prefix + name, field
            else:
                yield from walk(section["properties"], f"{prefix}{name}.")

    return dict(walk(schema["properties"], ""))


def test_the_schema_gives_every_key_with_meaning_and_range(atp):
    code, shown, _ = atp("config", "schema")
    found = sections(json.loads(shown))
    assert code == 0 and json.loads(shown)["$schema"].startswith("https://json-schema.org/")
    assert found["lora.alpha"]["exclusiveMinimum"] == 0 and found["lora.alpha"]["default"] == 32.0
    assert found["training.schedule"]["enum"] == ["constant", "linear", "cosine"]
    assert [key for key, field in found.items() if not field.get("description")] == [], "each key says what it is"


def test_show_prints_what_a_run_would_take(atp):
    words = ["examples/health-mini.yaml", "preset=paper", "training.lr=0.5"]
    code, shown, _ = atp("config", "show", *words)
    asked = ATPConfig.load(words[0], words[1:])
    assert code == 0 and yaml.safe_load(shown) == resolve(asked).model_dump(mode="json")
    assert resolve(ATPConfig.parse(yaml.safe_load(shown))) == resolve(asked), "and can be used in its place"
    code, shown, told = atp("config", "show", words[0], "training.learning_rate=1")
    assert (code, shown) == (2, "") and "did you mean 'lr'?" in told


def test_show_names_what_only_a_run_can_know_and_no_secret(atp, tmp_path):
    unknown = ("training.minutes=3", "decisions.target_decode_ms=9")
    code, shown, _ = atp("config", "show", "examples/health-mini.yaml", *unknown)
    first, rest = shown.split("\n", 1)
    assert code == 0
    assert first.endswith(": decisions.target_decode_ms, training.minutes, training.lr, training.update_clipping")
    values = yaml.safe_load(rest)
    assert values["training"]["minutes"] == 3 and values["training"]["precision"] in ("float32", "bfloat16")
    config = tmp_path / "a.yaml"
    config.write_text("model: {path: m}\noutput_dir: runs/hf_" + "a" * 30, encoding="utf-8")
    assert "runs/***" in atp("config", "show", config)[1]


def test_presets_are_shown_whole_and_without_a_command_the_help(atp):
    code, shown, _ = atp("config", "presets")
    listed = yaml.safe_load(shown)
    by_steps = "the defaults; from 400 steps on quick; from 1000 steps on standard; from 3000 steps on thorough"
    assert code == 0 and listed.pop("auto") == by_steps and listed == PRESETS
    code, _, told = atp("config")
    assert code == 2 and "schema" in told
