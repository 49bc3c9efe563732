"""Bytes of a base in 4 or 8 bits: those that the plan says are those of the tensors that a run holds."""

import pytest
import torch
from tiny_plans import RANK, job
from torch import nn
from transformers import AutoModelForCausalLM

from atp.lora.layer import add_lora
from atp.models.base import quantize_base
from atp.plan.memory import memory_of
from atp.plan.shapes import mask_of
from atp.removal import cut_model
from atp_kernels.quantized import dense

WIDE = {"hidden_size": 128, "head_dim": 16, "num_attention_heads": 8, "num_key_value_heads": 4}
ENDS = ("o_proj", "down_proj")


def parts(*overrides, **options):
    return {row["phase"]: row["parts"] for row in memory_of(job(*overrides, **WIDE | options))}


def frozen(model):
    return sum(p.nbytes for name, p in model.named_parameters() if "lora_" not in name)


@pytest.mark.parametrize("refit", [True, False])
@pytest.mark.parametrize("load_in", ["4bit", "8bit"])
def test_weights_before_and_after_the_cut_are_those_of_the_tensors(load_in, refit):
    overrides = [f"model.load_in={load_in}", f"decisions.refit_windows={4 * refit}", "training.settle=1"]
    planned, shapes = parts(*overrides), job(*overrides, **WIDE).shapes
    model = AutoModelForCausalLM.from_config(shapes.config)
    quantize_base(model, load_in, shapes.space)
    lora = add_lora(model, shapes.space, r=RANK, alpha=8, dropout=0.0)
    for phase in ("score", "open", "saliency"):
        assert planned[phase]["weights"] == frozen(lora), phase
    if refit:
        for name, module in lora.named_modules():
            if type(module) is nn.Linear and name.removesuffix(".base_layer").endswith(ENDS):
                module.weight = nn.Parameter(dense(module.weight), requires_grad=False)
    for phase in ("settle", "cut"):
        assert planned[phase]["weights"] == frozen(lora), phase
    cut = cut_model(lora, shapes.space, mask_of(shapes.space, shapes.counts))
    indices = sum(p.columns.nbytes for p in cut.parameters() if getattr(p, "columns", None) is not None)
    assert planned["tune"]["weights"] == frozen(cut) - indices


@pytest.mark.parametrize("load_in", ["4bit", "8bit"])
def test_a_round_keeps_the_quantized_weights_that_its_refit_replaces(load_in):
    planned = parts(f"model.load_in={load_in}", "decisions.rounds=2")
    model = AutoModelForCausalLM.from_config(job(**WIDE).shapes.config)
    quantize_base(model, load_in, job(**WIDE).shapes.space)
    ends = [m.weight.nbytes for name, m in model.named_modules() if name.endswith(ENDS)]
    assert planned["refit"]["originals"] == planned["saliency"]["originals"] == sum(ends)


def test_no_slice_cast_or_merged_copy_is_counted_and_one_floating_matrix_is():
    found = parts("model.load_in=4bit", "training.search=2", autocast=torch.bfloat16)
    assert "slices" not in found["search"] and "merged" not in found["saliency"]
    plain = parts("training.search=2", autocast=torch.bfloat16)
    assert plain["search"]["slices"] > 0 and plain["saliency"]["merged"] > 0
    largest = 256 * 128
    assert found["open"]["dequantized"] == largest * (4 + 2)
    assert "dequantized" not in plain["open"] and "load" not in plain
    assert found["load"]["weights"] == plain["score"]["weights"]
