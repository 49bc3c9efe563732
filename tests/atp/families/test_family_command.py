"""`atp train` on a folder of another family: evaluation, export, adapter with its base, loading again."""

import json
import math

import pytest
import torch
from peft import PeftModel
from tiny_command import results, start, stopping_at
from tiny_families import build, stock
from tiny_inputs import tiny_config
from transformers import AutoModelForCausalLM

from atp.config import ModelConfig
from atp.ground.errors import InputError
from atp.inputs.loading import load_any_model
from atp.spaces import EXPERT_SPACES
from atp.training.pruning import Pruning
from atp.training.trainer import ATPTrainer


@pytest.mark.slow
@pytest.mark.parametrize("name", ["qwen3", "granite", "phi3"])
def test_a_run_by_the_command(tmp_path, wide_budget, name):
    config = tiny_config(tmp_path)
    vocabulary = json.loads((tmp_path / "config.json").read_text())["vocab_size"]
    stock(name, scale=0.1, vocab_size=vocabulary, max_position_embeddings=512).save_pretrained(tmp_path)
    evaluation = {"windows": 4, "questions": 4, "dense_baseline": name == "qwen3"}
    start(config, tmp_path / "out", evaluation=evaluation)
    out = tmp_path / "out"
    model = load_any_model(ModelConfig(path=str(out / "model")))
    assert model.config.model_type == f"atp_{name}"
    base = AutoModelForCausalLM.from_pretrained(out / "base")
    adapted = PeftModel.from_pretrained(base, out / "adapter").eval()
    ids = torch.arange(2, 14)[None]
    with torch.no_grad():
        torch.testing.assert_close(adapted(ids).logits, model.eval()(ids).logits, rtol=1e-4, atol=1e-4)
    summary = json.loads((out / "summary.json").read_text())
    assert math.isfinite(summary["perplexity"]["final"]) and summary["params_after"] < summary["params_before"]


def test_a_checkpoint_with_weights_missing_is_refused(tmp_path):
    """A norm of the queries, which no other family has."""
    model = build("qwen3")
    state = {n: t for n, t in model.state_dict().items() if n != "model.layers.1.self_attn.q_norm.weight"}
    model.save_pretrained(tmp_path, state_dict=state)
    with pytest.raises(InputError, match="1 weight are missing|1 weight .*q_norm.weight"):
        load_any_model(ModelConfig(path=str(tmp_path)))


@pytest.mark.slow
@pytest.mark.parametrize("stop", ["freeze", "export"])
@pytest.mark.parametrize("space", EXPERT_SPACES)
def test_a_run_of_experts_that_was_stopped_ends_as_the_whole_one(tmp_path, wide_budget, space, stop):
    """Before the cut and after it; the adapter on its base is the model that was exported."""
    config = tiny_config(tmp_path)
    vocabulary = json.loads((tmp_path / "config.json").read_text())["vocab_size"]
    build("qwen3_moe", scale=0.1, vocab_size=vocabulary, max_position_embeddings=512).save_pretrained(tmp_path)
    settings = {
        "decisions": {"space": space, "uniform": True, "source": "running"},
        "lora": {"experts": space == "expert_channels"},
        "training": {"open": 3, "search": 2},
        "evaluation": {"windows": 4, "questions": 4, "dense_baseline": False},
    }
    start(config, tmp_path / "whole", **settings)
    with stopping_at(*{"freeze": (Pruning, "freeze"), "export": (ATPTrainer, "export")}[stop]):
        start(config, tmp_path / "out", **settings)
    start(config, tmp_path / "out", resume=True, **settings)
    assert results(tmp_path / "out") == results(tmp_path / "whole")
    out = tmp_path / "out"
    adapted = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(out / "base"), out / "adapter").eval()
    ids = torch.arange(2, 14)[None]
    with torch.no_grad():
        expected = AutoModelForCausalLM.from_pretrained(out / "model").eval()(ids).logits
        torch.testing.assert_close(adapted(ids).logits, expected, rtol=1e-4, atol=1e-4)
