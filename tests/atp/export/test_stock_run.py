"""Runs whose layers are all equal: model/ is a class of transformers' own, and can be cut again."""

import json
import os
import subprocess
import sys
import tomllib
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from peft import AutoPeftModelForCausalLM
from transformers import AutoModelForCausalLM, AutoTokenizer, MistralForCausalLM

from atp.data.splits import Example
from atp.data.tasks import PUBMEDQA
from atp.evaluation.harness import write_tasks
from atp.families import FAMILIES
from atp.inputs.checks import rounded
from atp.inputs.loading import load_shapes
from atp.models.config import config_class
from atp.removal import logit_gap
from atp.run import Run
from atp.studies.compare.baseline_run import BaselineRun


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


def test_an_equal_model_can_be_cut_again_by_another_source_of_decisions(finished, tmp_path):
    settings, folder, first, _ = finished
    again = settings_of(settings, tmp_path / "again", target_keep=0.7, source="learned")
    again.model.path = str(folder / "model")
    second = run(again, [])
    assert second["params_before"] == first["params_after"] > second["params_after"]
    assert type(AutoModelForCausalLM.from_pretrained(tmp_path / "again" / "model")) is MistralForCausalLM


def test_static_is_equal_too(config, tmp_path):
    settings = settings_of(config, tmp_path / "run")
    BaselineRun("static", settings, resume=False, command="atp compare", say=lambda line: None).execute()
    assert "MistralForCausalLM" in (tmp_path / "run" / "model" / "config.json").read_text()
    assert "import atp" not in (tmp_path / "run" / "model" / "README.md").read_text()


TASK = {
    "task": "tiny", "dataset_path": "json", "dataset_kwargs": {"data_files": {"test": "questions.jsonl"}},
    "test_split": "test", "output_type": "multiple_choice", "doc_to_text": "{{prompt}}", "doc_to_target": "label",
    "doc_to_choice": ["no", "yes"], "metric_list": [{"metric": "acc"}],
}  # fmt: skip


@pytest.mark.slow
def test_lm_eval_scores_the_folder_of_a_run_without_this_package(finished, tmp_path):
    """The command `lm_eval --model hf`, where nothing of this project can be imported, on its own task and on ours."""
    pytest.importorskip("lm_eval")
    _, folder, _, _ = finished
    tasks = tmp_path / "tasks"
    tasks.mkdir()
    (tasks / "tiny.yaml").write_text(yaml.safe_dump(TASK))
    rows = [{"prompt": f"{n} the heart rate of patients", "label": n % 2} for n in range(6)]
    write_tasks([Example("a", "the heart", " yes", "yes", "pubmedqa")], [PUBMEDQA], tasks)
    (tmp_path / "questions.jsonl").write_text("\n".join(map(json.dumps, rows)))
    alone = (
        "import sys; sys.modules['atp'] = sys.modules['atp_kernels'] = None; import lm_eval.__main__ as tool; "
        "tool.cli_evaluate()"
    )
    arguments = (
        f"--model hf --model_args pretrained={folder / 'model'} --include_path tasks --tasks tiny,atp_pubmedqa "
        "--device cpu"
    )
    place = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_CACHE": str(tmp_path / "cache")}
    done = subprocess.run(
        [sys.executable, "-c", alone, *arguments.split(), "--output_path", "scores"], cwd=tmp_path,
        env=os.environ | place, capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    (scores,) = (tmp_path / "scores").rglob("results_*.json")
    found = json.loads(scores.read_text())
    assert {name: counts["effective"] for name, counts in found["n-samples"].items()} == {"tiny": 6, "atp_pubmedqa": 1}
    assert found["results"]["atp_pubmedqa"]["acc,none"] in (0, 1)
    model = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32)
    assert found["results"]["tiny"]["acc,none"] == pytest.approx(accuracy(model, folder / "model", rows))


@torch.no_grad()
def accuracy(model, folder, rows):
    """Share of the questions whose label is the likelier of the two next words."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    choices = [tokenizer.convert_tokens_to_ids(word) for word in TASK["doc_to_choice"]]
    logits = [model(**tokenizer(row["prompt"], return_tensors="pt")).logits[0, -1, choices] for row in rows]
    return sum(int(own.argmax()) == row["label"] for own, row in zip(logits, rows, strict=True)) / len(rows)


def test_vllm_learns_which_class_runs_a_cut_model(monkeypatch):
    """Not run here: vLLM itself. Its plugins are entry points that take no argument, and may be called again."""
    registered = {}
    registry = SimpleNamespace(register_model=registered.__setitem__)
    monkeypatch.setitem(sys.modules, "vllm", SimpleNamespace(ModelRegistry=registry))
    project = tomllib.loads((Path(__file__).parents[3] / "pyproject.toml").read_text())["project"]
    module, function = project["entry-points"]["vllm.general_plugins"]["atp"].split(":")
    for _ in range(2):
        getattr(import_module(module), function)()
    classes = {AutoModelForCausalLM._model_mapping[config_class(family)].__name__ for family in FAMILIES}
    assert registered.keys() == classes
    assert set(registered.values()) == {"vllm.model_executor.models.transformers:TransformersForCausalLM"}
