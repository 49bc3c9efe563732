"""The baseline `disp_llm` as `atp compare` runs it: chosen, cut, tuned, exported and scored in its own space."""

import json

import torch
from transformers import AutoModelForCausalLM

from atp.compare.baseline_run import BaselineRun


def test_a_whole_run_in_its_own_space(config, tmp_path):
    values = config.model_dump(mode="json") | {"output_dir": str(tmp_path), "export": {"keep_adapter": True}}
    assert values["decisions"]["space"] == "kv_group"
    run = BaselineRun(
        "disp_llm", type(config).parse(values), resume=False, command="atp compare", say=lambda text: None
    )
    summary = run.execute()
    decisions = json.loads((tmp_path / "decisions.json").read_text())
    assert decisions["space"] == "disp" and decisions["sizes"]["attention_inputs"] == 32
    assert summary["certificate"]["cut_vs_reloaded"] < 1e-5 and summary["certificate"]["merge_error"] <= 1.0
    for part in ("model", "base"):
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path / part, dtype=torch.float32)
        shapes = [layer.self_attn.q_proj.in_features for layer in loaded.model.layers]
        assert shapes == [len(layer["attention_inputs"]) for layer in decisions["layers"]]
    assert sum(shapes) < 2 * 32
