"""A correct cut and export meets the certificate in every dtype of weights, and a wrong one does not."""

import copy
import math

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_cut_lora import fill_lora
from transformers import AutoModelForCausalLM
from zeroed import random_mask, stock_model, tokens

from atp.export import hf
from atp.ground.errors import NotReached
from atp.lora.controller import MaskController
from atp.lora.layer import add_lora
from atp.lora.regularizers.lasso import LoraGroups
from atp.removal import base_of, check_certificate, cut_model, logit_gap, merge_adapter, merge_error, reference_logits
from atp.removal.certify import AT_EXPORT, LIMITS, USUAL_ROUNDING, rounding_remark
from atp.removal.widen import widened
from atp.spaces.space import MaskSpace
from atp.training.certificate import at_cut, masked_logits

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Weights in float32; loading rounds them to another dtype, and leaves the frequencies of RoPE as they are."""
    path = tmp_path_factory.mktemp("stock")
    stock_model(dtype=torch.float32, tie_word_embeddings=True).save_pretrained(path)
    return path


def settled(folder, dtype, space_name="head_dim"):
    """A model in LoRA as a search leaves it: a mask, and nothing left on removed groups."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    space = MaskSpace.from_config(model.config, space_name)
    wrapped = fill_lora(add_lora(model, space, r=3, alpha=6.0, dropout=0.0)).eval()
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora_" in name:
                parameter.mul_(0.1)
    mask = random_mask(space)
    LoraGroups(wrapped, space).prox_(mask, 1e6)
    return wrapped, space, mask


def cut(folder, dtype):
    wrapped, space, mask = settled(folder, dtype)
    return cut_model(wrapped, space, mask)


def test_wide_arithmetic_is_that_of_a_float32_copy(folder):
    for dtype in (torch.bfloat16, torch.float16):
        model = cut(folder, dtype)
        before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        assert torch.equal(reference_logits(model, tokens()), reference_logits(copy.deepcopy(model).float(), tokens()))
        after = model.state_dict()
        assert all(after[n].dtype == t.dtype and torch.equal(after[n], t) for n, t in before.items())
        with torch.no_grad():
            assert model(input_ids=tokens()).logits.dtype == dtype


def test_weights_are_what_they_were_after_an_error_inside(folder):
    model = cut(folder, torch.bfloat16)
    layer = model.get_base_model().model.layers[1]

    def fail(*_):
        assert layer.mlp.up_proj.base_layer.weight.dtype == torch.float32
        raise RuntimeError("stop")

    hook = layer.mlp.down_proj.register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="stop"), widened(model):
        model(input_ids=tokens())
    hook.remove()
    assert {p.dtype for n, p in model.named_parameters() if "lora_" not in n} == {torch.bfloat16}
    with torch.no_grad():
        assert model(input_ids=tokens()).logits.dtype == torch.bfloat16


@pytest.mark.parametrize("space_name", ["head_dim", "kv_group", "disp"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_correct_cut_meets_its_limit(folder, dtype, space_name):
    wrapped, space, mask = settled(folder, dtype, space_name)
    reference = masked_logits(wrapped, MaskController(wrapped, space), mask, tokens())
    found = at_cut(reference, cut_model(wrapped, space, mask), tokens(), 0.0)
    assert found["masked_vs_cut"] < LIMITS["masked_vs_cut"] / 100
    assert found["dtype"] == str(dtype).removeprefix("torch.")


@pytest.mark.parametrize("name", ["qk", "vo", "mlp"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_one_layer_that_is_cut_wrong_misses_it(folder, dtype, name):
    """One decision of one structure of one layer is kept in the place of another."""
    wrapped, space, mask = settled(folder, dtype)
    reference = masked_logits(wrapped, MaskController(wrapped, space), mask, tokens())
    wrong = mask.clone()
    span = next(s for s in space.layer(2) if s.name == name).span
    kept, removed = (mask[span] == value for value in (True, False))
    wrong[span.start + int(kept.nonzero()[0])], wrong[span.start + int(removed.nonzero()[0])] = False, True
    with pytest.raises(NotReached, match="masked_vs_cut"):
        at_cut(reference, cut_model(wrapped, space, wrong), tokens(), 0.0)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_correct_export_meets_every_limit(folder, tmp_path, dtype):
    certificate = hf.export_model(cut(folder, dtype), tmp_path, None, tokens(), "card")
    check_certificate(certificate, AT_EXPORT)
    assert certificate["cut_vs_reloaded"] == 0.0
    assert 0.1 < certificate["merge_error"] <= 1.0
    assert certificate["dtype"] == str(dtype).removeprefix("torch.")
    assert 0 < certificate["rounding_gap"] <= USUAL_ROUNDING[certificate["dtype"]]
    assert rounding_remark(certificate) is None
    assert {t.dtype for t in load_file(tmp_path / "model" / "model.safetensors").values()} == {dtype}


def exported_wrongly(model, merged, wrong):
    """The merged model with one mistake."""
    layer = merged.model.layers[1]
    with torch.no_grad():
        if wrong == "no adapter":
            return base_of(model)
        if wrong == "adapter twice":
            for name, linear in merged.named_modules():
                if name.endswith("_proj"):
                    base = model.get_base_model().get_submodule(name).base_layer.weight
                    linear.weight.add_(linear.weight - base)
        if wrong == "no adapter on one linear":
            layer.mlp.up_proj.weight.copy_(model.get_base_model().model.layers[1].mlp.up_proj.base_layer.weight)
        if wrong == "flipped row":
            layer.mlp.down_proj.weight[3] *= -1
        if wrong == "rows exchanged":
            layer.self_attn.o_proj.weight[[2, 5]] = layer.self_attn.o_proj.weight[[5, 2]]
        if wrong == "norm":
            layer.input_layernorm.weight[0] *= 1 + 4 * torch.finfo(layer.input_layernorm.weight.dtype).eps
        if wrong == "rounded to bfloat16":
            layer.mlp.gate_proj.weight.copy_(layer.mlp.gate_proj.weight.bfloat16())
    return merged


MISTAKES = ["no adapter", "adapter twice", "no adapter on one linear", "flipped row", "rows exchanged", "norm"]


@pytest.mark.parametrize(
    ("dtype", "wrong"),
    [(dtype, wrong) for dtype in DTYPES for wrong in MISTAKES]
    + [(dtype, "rounded to bfloat16") for dtype in (torch.float32, torch.float16)],
)
def test_a_wrong_export_misses_one(folder, tmp_path, monkeypatch, dtype, wrong):
    model = cut(folder, dtype)
    merged = merge_adapter(model)
    # Nothing that is shared with the model may change with it.
    spoiled = exported_wrongly(model, copy.deepcopy(merged), wrong)
    monkeypatch.setattr(hf, "as_stored", lambda _: spoiled)
    certificate = hf.export_model(model, tmp_path, None, tokens(), "card")
    with pytest.raises(NotReached, match="merge_error"):
        check_certificate(certificate, AT_EXPORT)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_file_that_changed_on_its_way_to_disk_misses_one(folder, tmp_path, monkeypatch, dtype):
    original = hf._save

    def damaged(model, place, tokenizer, card):
        original(model, place, tokenizer, card)
        state = load_file(place / "model.safetensors")
        name = "model.layers.0.self_attn.q_proj.weight"
        state[name] = state[name].flip(0).contiguous()
        save_file(state, place / "model.safetensors", metadata={"format": "pt"})

    monkeypatch.setattr(hf, "_save", damaged)
    certificate = hf.export_model(cut(folder, dtype), tmp_path, None, tokens(), "card")
    assert certificate["merge_error"] > 1
    with pytest.raises(NotReached, match="cut_vs_reloaded"):
        check_certificate(certificate, AT_EXPORT)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_weights_that_are_rounded_twice_miss_one(folder, dtype):
    """The product rounded by itself, then the sum."""
    model = cut(folder, dtype)
    merged = copy.deepcopy(merge_adapter(model))
    assert merge_error(model, merged) <= 1
    with torch.no_grad():
        for name, linear in merged.named_modules():
            if name.endswith("_proj"):
                layer = model.get_base_model().get_submodule(name)
                linear.weight.copy_(layer.base_layer.weight + layer.get_delta_weight("default").to(dtype))
    assert merge_error(model, merged) > 1


def test_merge_error_of_other_names_shapes_and_nan(folder):
    model = cut(folder, torch.float32)
    merged = copy.deepcopy(merge_adapter(model))
    assert merge_error(model, stock_model(dtype=torch.float32)) == math.inf
    with torch.no_grad():
        merged.model.layers[0].mlp.up_proj.weight[0, 0] = math.nan
    assert math.isnan(merge_error(model, merged))
    with pytest.raises(NotReached, match="merge_error is nan"):
        check_certificate({"merge_error": math.nan}, ["merge_error"])


@pytest.mark.parametrize("dtype", DTYPES)
def test_rounding_gap_is_what_rounding_alone_changes(folder, tmp_path, dtype):
    """Against a float32 copy of the cut model with its adapter merged, nothing of which is rounded to the dtype."""
    model = cut(folder, dtype)
    certificate = hf.export_model(model, tmp_path, None, tokens(), "card")
    unrounded = merge_adapter(copy.deepcopy(model).float())
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32)
    expected = logit_gap(unrounded, reloaded, tokens()).relative
    assert certificate["rounding_gap"] == pytest.approx(expected, rel=1e-2, abs=1e-5)
    certificate["rounding_gap"] = 2 * USUAL_ROUNDING[certificate["dtype"]]
    assert f"rounding the weights to {certificate['dtype']} moved logits" in rounding_remark(certificate)


@pytest.mark.parametrize("dtype", ["float64", "float32", "float16", "bfloat16"])
def test_no_remedy_is_one_that_is_applied_already(dtype):
    remark = rounding_remark({"dtype": dtype, "rounding_gap": 2 * USUAL_ROUNDING[dtype]})
    assert f"rounding the weights to {dtype} moved logits" in remark
    assert ("model.dtype=float32" in remark) == (dtype in ("float16", "bfloat16"))
