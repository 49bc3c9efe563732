"""Whole runs with other adapters than plain LoRA, from the start to what others load, stopped and taken up again."""

import pytest
import torch
from peft import PeftModel
from tiny_command import read, results, start, stopping_at
from torch.testing import assert_close
from transformers import AutoModelForCausalLM

from atp.training.loop import Loop

STEPS = {"open": 3, "search": 0, "settle": 0, "tune": 3}


@pytest.mark.parametrize(("variant", "flag"), [("rslora", "use_rslora"), ("dora", "use_dora")])
def test_a_run_with_a_variant_is_loaded_and_taken_up_again(config, tmp_path, monkeypatch, variant, flag):
    overrides = {"lora": {"variant": variant}, "training": STEPS, "decisions": {"source": "running", "rounds": 2}}
    dense = []
    load = Loop.write

    def write(loop, state):
        dense.extend([loop.model.peft_config["default"]] if loop.checkpoint_root.parent.name == "dense_lora" else [])
        return load(loop, state)

    monkeypatch.setattr(Loop, "write", write)
    start(config, tmp_path / "out", **overrides)
    assert dense and all(getattr(found, flag) for found in dense), "the dense mark has the same adapter"
    certificate = read(tmp_path / "out", "certificate.json")
    assert certificate["masked_vs_cut"] < 1e-5 and certificate["cut_vs_reloaded"] < 1e-5
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "base")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "model")
    model = PeftModel.from_pretrained(base, tmp_path / "out" / "adapter")
    assert getattr(model.peft_config["default"], flag)
    ids = torch.arange(12)[None]
    with torch.no_grad():
        expected = merged(ids).logits
        assert_close(model(ids).logits, expected, rtol=1e-4, atol=1e-5)
        with model.disable_adapter():
            assert not torch.allclose(model(ids).logits, expected, rtol=1e-4, atol=1e-5), "the adapter learned"
    ended = results(tmp_path / "out")
    for step in (2, 3, 5):
        folder = tmp_path / str(step)
        with stopping_at(
            Loop, "write", after=True,
            when=lambda loop, state, step=step: state.step == step and loop.checkpoint_root.parent.name != "dense_lora",
        ):  # fmt: skip
            start(config, folder, **overrides)
        start(config, folder, resume=True, **overrides)
        assert results(folder) == ended, step
