"""Every family through whole runs, with a search and by the default recipe: cut, tune, export, reload, generate."""

import json

import pytest
import torch
from tiny_families import SPACES, VOCAB, build, tokens
from transformers import AutoModelForCausalLM

from atp.config import ATPConfig
from atp.data import PackedDataset
from atp.decide.budget import Budget
from atp.families import cut_type
from atp.inputs.checks import check_reachable
from atp.training.trainer import ATPTrainer

pytestmark = pytest.mark.slow


def windows(count, seed):
    """Windows of two samples each, which do not see each other."""
    ids = tokens(count, 16, seed)
    positions = torch.cat([torch.arange(6), torch.arange(10)]).expand(count, -1)
    return PackedDataset(ids, ids.masked_fill(positions == 0, -100), positions)


def config(folder, space, **overrides):
    values = {
        "model": {"path": "tiny"},
        "output_dir": str(folder),
        "data": {"length": 16},
        "decisions": {"space": space, "target_keep": 0.6, "saliency_windows": 2, "refit_windows": 4},
        "training": {"tune": 2, "batch_size": 2, "warmup": 1, "lr": 1e-2} | overrides,
    }  # fmt: skip
    return ATPConfig.parse(values)


RECIPES = {"search": {"search": 2, "settle": 1}, "default": {"open": 2, "search": 0, "settle": 0}}


@pytest.mark.parametrize(("dtype", "recipe"), [("float32", "search"), ("bfloat16", "default")])
@pytest.mark.parametrize(("name", "space"), SPACES)
def test_a_whole_run(tmp_path, name, space, dtype, recipe):
    model = build(name, getattr(torch, dtype), scale=0.1)
    settings = config(
        tmp_path, space, precision=dtype, gradient_checkpointing=recipe == "search", **RECIPES[recipe]
    )  # fmt: skip
    check_reachable(settings, model.config, tolerance=0.05)
    trainer = ATPTrainer(settings, model, windows(8, 1), windows(6, 2))
    trainer.train()
    certificate = trainer.export(tmp_path / "out")
    assert certificate["removed_lora_norm"] == 0.0
    assert certificate["masked_vs_cut"] < 1e-5 and certificate["cut_vs_reloaded"] < 1e-5
    assert certificate["merge_error"] <= 1.0
    assert abs(Budget(trainer.space).share(trainer.decisions.mask) - 0.6) < 0.05

    folder = tmp_path / "out" / "model"
    assert json.loads((folder / "config.json").read_text())["model_type"] in (name, cut_type(name))
    reloaded = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    removed = Budget(trainer.space).total - Budget(trainer.space).kept(trainer.decisions.mask)
    assert sum(p.numel() for p in reloaded.parameters()) == trainer.params_before - removed
    greedy = {"do_sample": False, "max_new_tokens": 8, "eos_token_id": None}
    prompt = tokens(2, 7)
    cached, plain = (reloaded.generate(prompt, use_cache=use, **greedy) for use in (True, False))
    assert cached.shape == (2, 15) and torch.equal(cached, plain) and int(cached.max()) < VOCAB
