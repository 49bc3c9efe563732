"""The baseline `disp_llm` as `atp compare` runs it: chosen, cut, tuned, exported and scored in its own space."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM

from atp.ground.errors import InputError
from atp.studies.compare.arms import Arm
from atp.studies.compare.baseline_run import BaselineRun
from atp.studies.compare.members import Members


def test_a_whole_run_in_its_own_space(config, tmp_path):
    values = config.model_dump(mode="json") | {"output_dir": str(tmp_path), "export": {"keep_adapter": True}}
    assert values["decisions"]["space"] == "kv_group"
    run = BaselineRun("disp_llm", type(config).parse(values), resume=False, command="atp", say=lambda text: None)
    summary = run.execute()
    decisions = json.loads((tmp_path / "decisions.json").read_text())
    assert decisions["space"] == "disp" and decisions["sizes"]["attention_inputs"] == 32
    assert summary["certificate"]["cut_vs_reloaded"] < 1e-5 and summary["certificate"]["merge_error"] <= 1.0
    for part in ("model", "base"):
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path / part, dtype=torch.float32)
        shapes = [layer.self_attn.q_proj.in_features for layer in loaded.model.layers]
        assert shapes == [len(layer["attention_inputs"]) for layer in decisions["layers"]]
    assert sum(shapes) < 2 * 32


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("training.search=0", "disp_llm learns its masks in training.search steps, which are 0"),
        ("decisions.uniform=true", "disp_llm cuts in space disp, without equal layers: leave out decisions.uniform"),
    ],
)
def test_what_it_cannot_do_is_refused_before_any_run(config, tmp_path, override, sentence):
    with pytest.raises(InputError, match=sentence):
        Members(config, tmp_path, command="").check([Arm("static"), Arm("disp_llm", (override,))], [0])
