"""Blocks that go as a whole, in every family, against its stock model with the ends of these blocks at zero."""

import copy
import subprocess
import sys

import pytest
import torch
from tiny_families import FAMILIES, LAYERS, build, cut_as_masked, random_mask, space_of, tokens, with_adapter
from torch.testing import assert_close
from transformers import AutoModelForCausalLM

from atp.baselines.slicegpt import sliced_width
from atp.decide.budget import Budget
from atp.families import UnsupportedModel, family_of
from atp.ground.errors import InputError
from atp.lora.controller import MaskController
from atp.lora.layer import add_lora, stock_modules, unload
from atp.models.stock import save_model, stock_config
from atp.plan.parameters import parameters_of
from atp.removal import cut_model, logit_gap, merge_adapter
from atp.removal.cut import cut_config
from atp.spaces.space import MaskSpace

GREEDY = {"do_sample": False, "max_new_tokens": 8, "eos_token_id": None, "min_new_tokens": 8}
ENDS = {"self_attn": "o_proj", "mlp": "down_proj"}


def without(space, gone, mask=None):
    """A mask that removes whole blocks: `gone` lists (layer, block)."""
    mask = torch.ones(space.size, dtype=torch.bool) if mask is None else mask.clone()
    for structure in space.structures:
        if (structure.layer, structure.block) in gone:
            mask[structure.span] = False
    return mask


def blocks_of(space):
    return [(structure.layer, structure.block) for structure in space.structures]


@torch.no_grad()
def silenced(model, gone):
    """A copy of a stock model in which these blocks give nothing: their last linear is zero, bias included."""
    model = copy.deepcopy(model)
    for layer, block in gone:
        *_, end = (
            m for m in model.model.layers[layer].get_submodule(block).children() if isinstance(m, torch.nn.Linear)
        )
        for parameter in end.parameters():
            parameter.zero_()
    return model


def patterns(space, name):
    """What may be gone: the first block, the first or second MLP, a layer; in llama also a kind, and all but one."""
    every = blocks_of(space)
    few = [[every[0]], [(1, "mlp"), (0, every[-1][1])], [pair for pair in every if pair[0] == LAYERS - 1]]
    if name != "llama":
        return few
    kinds = [[pair for pair in every if pair[1] == kind] for kind in ENDS]
    return [*few, *kinds, *([pair for pair in every if pair != one] for one in every)]


@pytest.mark.parametrize("name", FAMILIES)
@torch.no_grad()
def test_without_blocks_a_model_is_its_stock_model_whose_blocks_give_nothing(name):
    """Under masks in each form, and cut; in float64. Biases at the end of a block go with it."""
    model = build(name, torch.float64)
    space, ids = MaskSpace.from_config(model.config, space_of(name)), tokens()
    wrapped = add_lora(build(name, torch.float64), space, r=2, alpha=2.0, dropout=0.0).double().eval()
    controller, budget = MaskController(wrapped, space), Budget(space)
    for gone in patterns(space, name):
        mask = without(space, gone)
        expected = silenced(model, gone)(ids).logits
        assert (expected - model(ids).logits).abs().max() > 1e-4
        for form in ("sum", "base", "hard"):  # LoRA adds nothing yet
            with controller.masks(mask, form):
                assert_close(wrapped(ids).logits, expected, rtol=0, atol=1e-10)
        with controller.masks(mask.double(), "soft"):
            assert_close(wrapped(ids).logits, expected, rtol=0, atol=1e-10)
        cut = cut_model(model, space, mask)
        assert_close(cut(ids).logits, expected, rtol=0, atol=1e-10)
        assert budget.kept(mask) == sum(p.numel() for n, p in cut.named_parameters() if ".layers." in n)
        assert parameters_of(cut.config)["total"] == sum(p.numel() for p in cut.parameters())
        assert stock_config(cut.config) is None
        names = {name.split(".", 3)[3] for name, _ in cut.named_parameters() if name.startswith("model.layers.0.")}
        lost = [own for own in family_of(model.config).blocks if (0, own.module) in gone]
        assert not [name for name in names for own in lost if own.holds(name)]


@pytest.mark.parametrize("name", FAMILIES)
@torch.no_grad()
def test_masked_layers_compute_what_the_cut_model_computes(name):
    """LoRA included, with other structures narrowed too; the slices of a LoRA step give what masks give."""
    model = build(name, torch.float64)
    space, ids = MaskSpace.from_config(model.config, space_of(name)), tokens()
    wrapped = with_adapter(model, space)
    for gone in patterns(space, name):
        mask = without(space, gone, random_mask(space))
        cut, _ = cut_as_masked(wrapped, space, mask)
        assert logit_gap(merge_adapter(cut), cut, ids).relative < 1e-6
        assert Budget(space).kept(mask) == sum(
            p.numel() for n, p in cut.named_parameters() if ".layers." in n and ".lora_" not in n
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", FAMILIES)
@torch.no_grad()
def test_a_saved_model_reloads_and_generates_with_a_cache_what_it_does_without(name, dtype, tmp_path):
    model = build(name, dtype)
    space, ids = MaskSpace.from_config(model.config, space_of(name)), tokens()
    kind = "self_attn" if space_of(name) == "kv_group" else "mlp"
    gone = [(0, kind), (1, "mlp")]
    cut = cut_model(model, space, without(space, gone, random_mask(space)))
    save_model(cut, tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype).eval()
    assert [again.config.layer_shape(layer).skip for layer in range(LAYERS)] == [
        ("attention",) if kind == "self_attn" else ("mlp",), ("mlp",), (),
    ]  # fmt: skip
    assert logit_gap(cut, again, ids).absolute == 0
    if dtype == torch.float32:  # in bfloat16 passes of another shape round otherwise, and near-ties turn
        expected = again.generate(ids, use_cache=False, **GREEDY)
        assert torch.equal(again.generate(ids, **GREEDY), expected)
        assert torch.equal(cut.generate(ids, **GREEDY), expected)
    start, rest = ids.split([3, ids.shape[1] - 3], dim=1)
    cache = again(start, use_cache=True).past_key_values
    found, whole = again(rest, past_key_values=cache).logits, again(ids).logits  # by a caller that gives no positions
    assert_close(
        found, whole[:, 3:], rtol=0, atol=float(whole.abs().max()) * (1e-5 if dtype == torch.float32 else 0.03)
    )


def test_a_process_of_its_own_loads_the_model(tmp_path):
    model = build("llama")
    space = MaskSpace.from_config(model.config, "kv_group")
    cut = cut_model(model, space, without(space, [(0, "self_attn"), (2, "mlp")]))
    save_model(cut, tmp_path)
    script = (
        "import torch, atp, sys\nfrom transformers import AutoModelForCausalLM\n"
        f"model = AutoModelForCausalLM.from_pretrained({str(tmp_path)!r})\n"
        f"ids = torch.tensor({tokens().tolist()})\n"
        f"torch.save(model(ids).logits.detach(), {str(tmp_path / 'logits.pt')!r})\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True)
    assert torch.equal(torch.load(tmp_path / "logits.pt"), cut(tokens()).logits.detach())


@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma2", "olmo2", "hunyuan_v1_dense"])
def test_a_model_without_blocks_is_tuned_and_cut_again(name, tmp_path):
    """It may lose more blocks, keeps those that are gone gone, and its tables count what is there."""
    model = build(name)
    spaces = space_of(name)
    space = MaskSpace.from_config(model.config, spaces)
    kind = blocks_of(space)[0][1]
    model = cut_model(model, space, without(space, [(0, kind), (2, "mlp")], random_mask(space)))
    for number, gone in enumerate(([(1, "mlp")], [(1, kind), (1, "mlp")])):
        space = MaskSpace.from_config(model.config, spaces)
        budget = Budget(space)
        assert budget.total == sum(parameter.numel() for parameter in model.model.layers.parameters())
        stock = stock_modules(model)
        lora = add_lora(model, space, r=2, alpha=2.0, dropout=0.0)
        lora(tokens(), labels=tokens()).loss.backward()
        present = {(layer, name) for layer in range(LAYERS) for name in space.present(layer)}
        assert len([n for n, p in lora.named_parameters() if "lora_B" in n and p.grad.abs().max() > 0]) == len(present)
        with torch.no_grad():
            for factor in (p for n, p in lora.named_parameters() if "lora_B" in n):
                factor.normal_(0, 0.1)
        lora.eval()
        controller, mask = MaskController(lora, space), without(space, gone, random_mask(space, seed=number, keep=0.7))
        found = {}
        for form in ("sum", "base", "hard"):
            with controller.masks(mask, form), torch.no_grad():
                found[form] = lora(tokens()).logits
        assert_close(found["hard"], found["base"], rtol=1e-4, atol=1e-4)
        cut = cut_model(lora, space, mask)
        assert_close(found["sum"], cut(tokens()).logits.detach(), rtol=1e-4, atol=1e-4)
        merged = merge_adapter(cut)
        assert budget.kept(mask) == sum(parameter.numel() for parameter in merged.model.layers.parameters())
        plain = unload(lora, stock)
        assert not any(".lora_" in name for name, _ in plain.named_parameters())
        save_model(merged, tmp_path / str(number))
        again = AutoModelForCausalLM.from_pretrained(tmp_path / str(number), dtype=torch.float32)
        assert logit_gap(merged, again, tokens()).absolute == 0
        model = merged.eval()
    lacks = [model.config.layer_shape(layer).skip for layer in range(LAYERS)]
    own = {"self_attn": "attention", "mlp": "mlp"}[kind]
    assert set(lacks[0]) == {own} and set(lacks[1]) == {own, "mlp"} and lacks[2] == ("mlp",)


def test_what_no_model_can_do_is_refused():
    model = build("llama")
    space = MaskSpace.from_config(model.config, "kv_group")
    with pytest.raises(ValueError, match="removes every block of every layer: keep at least one"):
        cut_config(model.config, space, without(space, blocks_of(space)))
    head_dim = MaskSpace.from_config(model.config, "head_dim")
    mask = torch.ones(head_dim.size, dtype=torch.bool)
    mask[head_dim.layer(1)[2].span] = False
    with pytest.raises(ValueError, match="layer 1 would keep none of its 48 mlp decisions: keep at least one, because"):
        cut_config(model.config, head_dim, mask)
    cut = cut_model(model, space, without(space, [(1, "self_attn"), (2, "mlp")]))
    with pytest.raises(UnsupportedModel, match="cut already and its layer 1 has no attention: use kv_group or mlp$"):
        MaskSpace.from_config(cut.config, "head_dim")
    with pytest.raises(InputError, match="slicegpt rotates between the blocks of all layers, but layer 1 has no att"):
        sliced_width(cut.config, 0.6)
    assert MaskSpace.from_config(cut.config, "mlp").emptied(torch.ones(96, dtype=torch.bool))[0].layer == 2
