"""Whole runs on a model whose layers differ in width already: resumed, exported, planned, and what it refuses."""

import json
import shutil

import pytest
import torch
from tiny_command import read, results, start, stopping_at
from transformers import AutoModelForCausalLM

from atp.config import ATPConfig
from atp.export.gguf import architecture_of
from atp.ground.errors import InputError
from atp.models.load import read_config
from atp.models.stock import save_model
from atp.plan import make_plan
from atp.removal import cut_model
from atp.report import write_report
from atp.spaces.space import MaskSpace
from atp.studies.compare.baseline_run import BaselineRun
from atp.training.trainer import ATPTrainer

pytestmark = pytest.mark.usefixtures("wide_budget")


@pytest.fixture(scope="module")
def unequal(config, tmp_path_factory):
    """The config on a model with 2 and 1 KV groups, and 96 and 60 channels."""
    folder = tmp_path_factory.mktemp("unequal") / "inputs"
    shutil.copytree(config.model.path, folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    space = MaskSpace.from_config(model.config, "kv_group")
    mask = torch.ones(space.size, dtype=torch.bool)
    second = space.layer(1)
    mask[second[0].start + 1] = False
    mask[second[1].start + 60 : second[1].span.stop] = False
    save_model(cut_model(model, space, mask), folder)
    values = config.model_dump(mode="json")
    values["model"]["path"] = str(folder)
    values["evaluation"] |= {"dense_baseline": False, "windows": 4, "questions": 2}
    return ATPConfig.parse(values)


@pytest.fixture(scope="module")
def finished(unequal, tmp_path_factory):
    folder = tmp_path_factory.mktemp("again") / "out"
    return folder, start(unequal, folder)


def parameters(folder):
    return sum(p.numel() for p in AutoModelForCausalLM.from_pretrained(folder).parameters())


def test_shares_and_counts_are_of_the_model_that_was_given(unequal, finished):
    folder, summary = finished
    assert summary["params_before"] == parameters(unequal.model.path)
    assert summary["params_after"] == parameters(folder / "model") < summary["params_before"]
    assert abs(summary["keep_decoder"] - 0.6) <= 0.02
    certificate = read(folder, "certificate.json")
    assert certificate["masked_vs_cut"] < 1e-4 and certificate["cut_vs_reloaded"] < 1e-4
    decisions = read(folder, "decisions.json")
    assert decisions["sizes"] == {"kv_group": [2, 1], "mlp": [96, 60]}
    assert architecture_of(read_config(folder / "model"), "the result").name == "deci", "which has widths per layer"
    page = write_report(folder).read_text(encoding="utf-8")  # with the drawings that conftest.py leaves out
    assert "mlp (of 60 to 96)" in page and "is left out" not in page and page.count("<svg") >= 2


def test_a_third_run_takes_what_the_second_left(unequal, finished, tmp_path):
    folder, second = finished
    again = ATPConfig.parse(unequal.model_dump(mode="json"), [f"model.path={folder / 'model'}"])
    third = start(again, tmp_path / "third", decisions={"target_keep": 0.8, "source": "learned"})
    assert third["params_before"] == second["params_after"] > third["params_after"]


def test_a_stop_in_the_middle_resumes_to_the_same_bytes(unequal, finished, tmp_path):
    folder = tmp_path / "out"
    with stopping_at(ATPTrainer, "export"):
        start(unequal, folder)
    newest = max((folder / "checkpoints").glob("checkpoint-*"), key=lambda path: int(path.name.rpartition("-")[2]))
    shutil.rmtree(newest)  # so that steps of the cut model are repeated
    start(unequal, folder, resume=True)
    assert results(folder) == results(finished[0])


@pytest.mark.parametrize("method", ["static", "wanda_sp", "slicegpt"])
def test_baselines_take_it_too(unequal, tmp_path, method):
    values = unequal.model_dump(mode="json") | {"output_dir": str(tmp_path / "out")}
    run = BaselineRun(method, ATPConfig.parse(values), resume=False, command="atp compare", say=lambda line: None)
    summary = run.execute()
    assert summary["params_after"] == parameters(tmp_path / "out" / "model") < summary["params_before"]
    assert summary["certificate"]["cut_vs_reloaded"] < 1e-4
    if method != "slicegpt":
        assert abs(summary["keep_decoder"] - 0.6) <= 0.02


def test_a_plan_counts_each_layer(unequal):
    plan = make_plan(unequal)
    assert plan["model"]["family"] == "llama"
    assert plan["parameters"]["before"]["total"]["parameters"] == parameters(unequal.model.path)
    assert plan["widths"]["mlp"]["of"] == [96, 60] and plan["widths"]["kv_group"]["of"] == [2, 1]
    kept = plan["widths"]["mlp"]["kept"]
    assert kept[0] / 96 == pytest.approx(kept[1] / 60, abs=0.02)
    assert abs(plan["parameters"]["decoder_share"] - 0.6) < 0.02
    assert "as a share of what the layer has now" in plan["remarks"][0]
    json.dumps(plan)


@pytest.mark.parametrize("where", ["plan", "run"])
def test_equal_counts_are_refused_before_anything_is_written(unequal, tmp_path, where):
    asked = ATPConfig.parse(unequal.model_dump(mode="json"), ["decisions.uniform=true"])
    with pytest.raises(InputError, match="layers of this model differ in width already"):
        make_plan(asked) if where == "plan" else start(asked, tmp_path / "out")
    assert not (tmp_path / "out").exists()
