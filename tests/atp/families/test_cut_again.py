"""Models whose layers differ in width already: cut two and three times, and tuned with stock PEFT."""

import json

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny_families import build, random_mask, tokens
from transformers import AutoModelForCausalLM

from atp.baselines.slicegpt import residual_bases, slice_model, sliced_width
from atp.baselines.uniform import uniform_mask
from atp.data import collate
from atp.decide.budget import Budget
from atp.decide.fit import fit_mask
from atp.decide.reach import nearest_share
from atp.decide.rules import width_rules
from atp.decide.uniform import require_equal_layers
from atp.ground.errors import InputError
from atp.lora.controller import MaskController
from atp.lora.layer import add_lora
from atp.models.load import read_config
from atp.models.sizes import check_against_files
from atp.models.stock import save_model
from atp.plan.parameters import parameters_of
from atp.removal import compare, cut_model, logit_gap, merge_adapter, reference_logits
from atp.spaces.space import MaskSpace

WIDE = {"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 8, "intermediate_size": 48}


def narrow(space, groups, channels):
    """The mask that keeps the first of every structure: so many in each layer."""
    counts = {"kv_group": groups, "mlp": channels}
    mask = torch.zeros(space.size, dtype=torch.bool)
    for structure in space.structures:
        mask[structure.start : structure.start + counts[structure.name][structure.layer]] = True
    return mask


def unequal(name="llama"):
    """A model of three layers with 4, 2 and 3 KV groups of 4, and 48, 31 and 20 channels of 48."""
    model = build(name, **WIDE)
    space = MaskSpace.from_config(model.config, "kv_group")
    return cut_model(model, space, narrow(space, [4, 2, 3], [48, 31, 20]))


def decoder(model):
    return sum(parameter.numel() for parameter in model.model.layers.parameters())


@pytest.mark.parametrize(
    "name",
    ["llama", "qwen3", "qwen2", "granite", "gemma2", "gemma3_text", "hunyuan_v1_dense", "exaone4", "phi3", "glm4"],
)
def test_a_second_and_a_third_cut_change_no_logits(tmp_path, name):
    model = unequal(name)
    for number in (2, 3):
        space = MaskSpace.from_config(model.config, "kv_group")
        budget, mask = Budget(space), random_mask(space, seed=number, keep=0.7)
        assert budget.total == decoder(model), "shares are of the model that is given"
        lora = add_lora(model, space, r=2, alpha=2.0, dropout=0.0).eval()
        with torch.no_grad():
            for factor in (p for n, p in lora.named_parameters() if "lora_B" in n):
                factor.normal_(0, 0.1)
        controller = MaskController(lora, space)
        whole = reference_logits(lora, tokens())
        controller.set(mask, "sum")
        masked = reference_logits(lora, tokens())
        controller.clear()
        cut = cut_model(lora, space, mask)
        assert compare(masked, cut, tokens()).relative < 1e-5 < compare(whole, cut, tokens()).relative
        model = merge_adapter(cut)
        assert decoder(model) == budget.kept(mask) < budget.total
        assert model.config.model_type == f"atp_{name}" and model.config.per_layer_attributes
        save_model(model, tmp_path / str(number))
        again = AutoModelForCausalLM.from_pretrained(tmp_path / str(number), dtype=torch.float32)
        assert logit_gap(model, again, tokens()).absolute == 0
        assert parameters_of(again.config)["total"] == sum(p.numel() for p in again.parameters())


def test_the_table_has_each_layers_own_numbers():
    space = MaskSpace.from_config(unequal().config, "kv_group")
    sizes = {name: [s.size for s in layers] for name, layers in space.by_name().items()}
    assert sizes == {"kv_group": [4, 2, 3], "mlp": [48, 31, 20]} and not space.equal_layers
    assert [linears["self_attn.q_proj"].out_features for linears in space.linears] == [64, 32, 48]
    assert [linears["mlp.down_proj"].in_features for linears in space.linears] == [48, 31, 20]


@pytest.mark.parametrize("space_name", ["kv_group", "head_dim", "disp"])
def test_a_unit_costs_what_its_removal_saves_in_that_layer(space_name):
    """In space head_dim a pair of rows costs more in a layer with more heads."""
    model = unequal()
    space = MaskSpace.from_config(model.config, space_name)
    cost = Budget(space).cost()
    for structure in space.structures:
        mask = torch.ones(space.size, dtype=torch.bool)
        mask[structure.start] = False
        cut = cut_model(model, space, mask)
        assert decoder(model) - decoder(cut) == float(cost[structure.start]), (structure.layer, structure.name)
    firsts = {name: {float(cost[s.start]) for s in layers} for name, layers in space.by_name().items()}
    assert {name: len(found) for name, found in firsts.items() if len(found) > 1}.keys() == {
        "kv_group": set(), "head_dim": {"qk", "vo"},
        "disp": {"attention_inputs", "attention_outputs", "mlp_inputs", "mlp_outputs"},
    }[space_name]  # fmt: skip


def test_other_spaces_leave_the_heads_that_are_there():
    model = unequal()
    space = MaskSpace.from_config(model.config, "head_dim")
    cut = cut_model(model, space, random_mask(space))
    shapes = [cut.config.layer_shape(layer) for layer in range(3)]
    assert [(s.num_attention_heads, s.num_key_value_heads) for s in shapes] == [(8, 4), (4, 2), (6, 3)]


@pytest.mark.parametrize("rule", [fit_mask, uniform_mask])
def test_masks_meet_a_budget_over_unequal_layers(rule):
    space = MaskSpace.from_config(unequal().config, "kv_group")
    budget = Budget(space)
    scores = torch.randn(space.size, generator=torch.Generator().manual_seed(0))
    mask = rule(scores, 0.6, budget, {})
    one_channel = float(budget.cost()[space.layer(0)[1].start]) / budget.total
    assert abs(budget.share(mask) - 0.6) <= one_channel
    assert all(mask[structure.span].any() for structure in space.structures)
    assert abs(nearest_share(budget, 0.6, {}) - 0.6) <= one_channel


def test_width_rules_divide_every_layer():
    model = build("llama", **WIDE | {"intermediate_size": 2048})
    first = MaskSpace.from_config(model.config, "kv_group")
    for last, step in ((512, 4), (514, 2), (515, None)):
        mask = narrow(first, [4, 2, 3], [2048, 1024, last])
        space = MaskSpace.from_config(cut_model(model, first, mask).config, "kv_group")
        assert width_rules(Budget(space), 0.6, None).get("mlp") == step


@pytest.mark.parametrize("form", ["per_layer_config", "layer_shapes"])
def test_widths_beyond_every_model_are_refused_before_a_table_is_made(tmp_path, form):
    save_model(unequal(), tmp_path)
    content = json.loads((tmp_path / "config.json").read_text())
    wide = {"intermediate_size": 10**12}
    content.pop("per_layer_config")
    content[form] = {"1": wide} if form == "per_layer_config" else [{}, wide, {}]
    (tmp_path / "config.json").write_text(json.dumps(content))
    with pytest.raises(InputError, match="intermediate_size of layer 1 is 1000000000000: make it at most 16777216"):
        read_config(tmp_path)


def test_more_weights_than_the_files_hold_are_refused():
    config = unequal().config
    check_against_files(config, 4 * 10**5)
    config.per_layer_config = {layer: {"intermediate_size": 2**22} for layer in range(3)}
    with pytest.raises(InputError, match="describes 1,207,.* weights and its files hold 400,000 bytes"):
        check_against_files(config, 4 * 10**5)


def test_equal_counts_are_refused_in_a_sentence():
    with pytest.raises(InputError, match="differ in width already: set decisions.uniform=false, or give the model"):
        require_equal_layers(MaskSpace.from_config(unequal().config, "kv_group"))
    require_equal_layers(MaskSpace.from_config(build("llama").config, "kv_group"))


def test_slicegpt_takes_an_unequal_model():
    model = unequal().eval()
    width = sliced_width(model.config, 0.6)
    batches = [collate([{"input_ids": row, "labels": row} for row in tokens()])]
    sliced = slice_model(model, residual_bases(model, batches, width))
    whole = slice_model(model, residual_bases(model, batches, model.config.hidden_size))
    assert logit_gap(model, whole, tokens()).relative < 1e-4
    assert abs(decoder(sliced) / decoder(model) - 0.6) < 0.2


def test_stock_peft_trains_and_merges_into_an_unequal_model():
    torch.manual_seed(0)
    model = unequal().train()
    lora = get_peft_model(model, LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM"))
    optimizer = torch.optim.AdamW([p for p in lora.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(5):
        loss = lora(input_ids=tokens(), labels=tokens()).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    tuned = reference_logits(lora, tokens())
    merged = lora.merge_and_unload()
    assert compare(tuned, merged, tokens()).relative < 1e-5
    assert MaskSpace.from_config(merged.config, "kv_group").layer(1)[0].size == 2, "and can be cut again"


def test_a_space_of_unequal_layers_moves_to_another_device():
    space = MaskSpace.from_config(unequal().config, "kv_group")
    moved = space.to(torch.device("meta"))
    assert all(cut.owner.is_meta for structure in moved.structures for cut in structure.cuts)
    assert not any(cut.owner.is_meta for structure in space.structures for cut in structure.cuts)
    shapes = [[len(cut.owner) for cut in structure.cuts] for structure in moved.structures]
    assert shapes == [[len(cut.owner) for cut in structure.cuts] for structure in space.structures]
