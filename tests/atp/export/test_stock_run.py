"""Runs whose layers are all equal: model/ is a class of transformers' own, and can be cut again."""

import json
import tomllib
from importlib import import_module
from pathlib import Path

import pytest
import torch
from peft import AutoPeftModelForCausalLM
from transformers import AutoModelForCausalLM, MistralForCausalLM

from atp.checks import rounded
from atp.compare.baseline_run import BaselineRun
from atp.config import ATPConfig
from atp.loading import load_shapes
from atp.removal import logit_gap
from atp.run import Run


def settings_of(config, folder, **decisions):
    settings = config.model_copy(deep=True)
    settings.output_dir, settings.evaluation.dense_baseline = str(folder), False
    settings.decisions.uniform, settings.export.keep_adapter = True, True
    settings.decisions.space, settings.decisions.multiples = "kv_group", {"mlp": 4}
    for key, value in decisions.items():
        setattr(settings.decisions, key, value)
    return settings


def run(settings, said):
    return Run(settings, resume=False, command="atp train", say=said.append).execute()


@pytest.fixture(scope="module")
def finished(config, tmp_path_factory):
    folder, said = tmp_path_factory.mktemp("equal") / "run", []
    settings = settings_of(config, folder)
    return settings, folder, run(settings, said), said


def test_model_base_and_card_need_nothing_of_ours(finished):
    _, folder, summary, _ = finished
    for name in ("model", "base"):
        content = json.loads((folder / name / "config.json").read_text())
        assert content["architectures"] == ["MistralForCausalLM"] and content["model_type"] == "mistral"
        assert not {"per_layer_config", "layer_shapes", "family"} & content.keys()
    for name in ("model", "adapter"):
        assert "import atp" not in (folder / name / "README.md").read_text(), "nothing needs the package"
    merged = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32)
    assert type(merged) is MistralForCausalLM
    named = AutoPeftModelForCausalLM.from_pretrained(folder / "adapter", dtype=torch.float32)
    ids = torch.randint(0, 60, (3, 16), generator=torch.Generator().manual_seed(0))
    assert logit_gap(merged, named, ids).relative < 1e-4
    certificate = json.loads((folder / "certificate.json").read_text())
    assert certificate["cut_vs_reloaded"] <= 1e-5 and certificate["masked_vs_cut"] < 1e-4


def test_the_budget_is_kept_to_half_a_step_and_said_beforehand(finished):
    settings, _, summary, said = finished
    assert abs(summary["keep_decoder"] - 0.6) <= summary["rounding"]
    (sentence,) = rounded(settings, load_shapes(settings.model))
    assert sentence in said and sentence.startswith("equal layers keep between")
    settings = settings.model_copy(deep=True)
    settings.decisions.uniform = False
    assert rounded(settings, load_shapes(settings.model)) == []


def test_an_equal_model_can_be_cut_again(finished, tmp_path):
    settings, folder, first, _ = finished
    again = settings_of(settings, tmp_path / "again", target_keep=0.7)
    again.model.path = str(folder / "model")
    second = run(again, [])
    assert second["params_before"] == first["params_after"] > second["params_after"]
    assert type(AutoModelForCausalLM.from_pretrained(tmp_path / "again" / "model")) is MistralForCausalLM


@pytest.mark.parametrize("source", ["learned", "running"])
def test_other_sources_of_decisions_end_equal_too(config, tmp_path, source):
    settings = settings_of(config, tmp_path / "run", source=source)
    run(settings, [])
    assert type(AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "model")) is MistralForCausalLM


def test_static_is_equal_too(config, tmp_path):
    settings = settings_of(config, tmp_path / "run")
    BaselineRun("static", settings, resume=False, command="atp compare", say=lambda line: None).execute()
    assert "MistralForCausalLM" in (tmp_path / "run" / "model" / "config.json").read_text()
    assert "import atp" not in (tmp_path / "run" / "model" / "README.md").read_text()


def test_vllm_finds_what_registers_the_class():
    """Not run here: vLLM itself. Its plugins are entry points that take no argument."""
    project = tomllib.loads((Path(__file__).parents[3] / "pyproject.toml").read_text())["project"]
    module, function = project["entry-points"]["vllm.general_plugins"]["atp"].split(":")
    getattr(import_module(module), function)()
    config = ATPConfig.parse({"model": {"path": "m"}, "output_dir": "o", "preset": "stock"})
    assert config.decisions.uniform and config.decisions.space == "kv_group"
