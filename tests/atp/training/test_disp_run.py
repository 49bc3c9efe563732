"""A run in the space `disp`: one-stage job, resume from every phase, selections that reach the exported model."""

import json

import pytest
import torch
from tiny_run import CUT, SEARCH, make, trained_tensors
from transformers import AutoModelForCausalLM

from atp.decide.budget import Budget
from atp.training import checkpoint as checkpoints

DISP = {"space": "disp", "refit_windows": 3, "init": "paper"}  # the saliency of so small a model spares attention


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    folder = tmp_path_factory.mktemp("unbroken")
    trainer = make(folder, decisions=DISP)
    trainer.train()
    return trainer, folder, trained_tensors(trainer)


def test_all_five_structures_move_and_the_export_holds_their_selections(unbroken, tmp_path):
    trainer, folder, _ = unbroken
    certificate = trainer.export(tmp_path)
    assert certificate["removed_lora_norm"] == 0.0 and certificate["merge_error"] <= 1.0
    assert certificate["masked_vs_cut"] < 1e-5 and certificate["cut_vs_reloaded"] < 1e-5
    assert certificate["frozen_vs_cut"] > 10 * certificate["masked_vs_cut"], "removed LoRA groups had learnt something"
    space, mask = trainer.space, trainer.decisions.mask
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    for structure in space.layer(0):
        assert min(records[CUT - 1]["kept_by_layer"][structure.name]) < 1
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    for layer, kept in enumerate(space.kept_indices(mask)):
        shape = reloaded.config.layer_shape(layer)
        assert shape.intermediate_size == len(kept.pop("mlp"))
        assert all((getattr(shape, name) or list(range(32))) == positions for name, positions in kept.items())
    removed = Budget(space).total - Budget(space).kept(mask)
    assert sum(p.numel() for p in reloaded.parameters()) == trainer.params_before - removed
    assert abs(Budget(space).share(mask) - 0.6) < 0.005


@pytest.mark.parametrize("step", [2, SEARCH, SEARCH + 1, CUT, CUT + 2])
def test_resume_is_bit_exact(unbroken, tmp_path, step):
    trainer, folder, expected = unbroken
    loaded = checkpoints.load(folder / "checkpoints" / f"checkpoint-{step:08d}")
    loaded.meta["config"]["output_dir"] = str(tmp_path)
    checkpoints.save(tmp_path / "checkpoints", loaded, keep=1)
    resumed = make(tmp_path, decisions=DISP)
    torch.manual_seed(999)  # what the process did before must not matter
    resumed.train(resume=True)
    assert torch.equal(resumed.decisions.mask, trainer.decisions.mask)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in trained_tensors(resumed).items())
