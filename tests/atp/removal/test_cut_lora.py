"""The cut of a PEFT model, against stock LoRA whose removed rows and columns are zeroed by hand."""

import copy

import peft
import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import Linear as StockLora
from torch.testing import assert_close
from zeroed import HEAD_DIM, HEADS, INNER, KV_HEADS, random_mask, stock_model, tokens, zeroed

from atp.lora.controller import MaskController
from atp.lora.layer import MaskedPeftLinear, add_lora
from atp.models import ATPLlamaForCausalLM
from atp.removal.certify import merge_error
from atp.removal.cut import cut_model, cut_state_dict, merge_adapter
from atp.spaces.space import MaskSpace

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def fill_lora(model, seed=3):
    """LoRA starts at B = 0: give both factors weight."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    return model


def stock_lora(dtype=torch.float64, **overrides):
    config = LoraConfig(r=3, lora_alpha=6, target_modules=TARGETS, task_type="CAUSAL_LM")
    model = get_peft_model(stock_model(dtype=dtype, **overrides), config, autocast_adapter_dtype=False)
    return fill_lora(model).eval()


@torch.no_grad()
def zero_lora(model, kept):
    """Zeroes removed rows of B and removed columns of A of the head_dim space, head by head."""
    for layer, by_name in zip(model.get_base_model().model.layers, kept, strict=True):
        attention, mlp = layer.self_attn, layer.mlp
        pairs, dims, inner = (
            [i for i in range(size) if i not in by_name[name]]
            for name, size in (("qk", HEAD_DIM // 2), ("vo", HEAD_DIM), ("mlp", INNER))
        )
        for linear in (attention.q_proj, attention.k_proj):
            linear.lora_B["default"].weight.view(-1, 2, HEAD_DIM // 2, 3)[:, :, pairs] = 0
        attention.v_proj.lora_B["default"].weight.view(KV_HEADS, HEAD_DIM, 3)[:, dims] = 0
        attention.o_proj.lora_A["default"].weight.view(3, HEADS, HEAD_DIM)[:, :, dims] = 0
        for linear in (mlp.gate_proj, mlp.up_proj):
            linear.lora_B["default"].weight[inner] = 0
        mlp.down_proj.lora_A["default"].weight[:, inner] = 0


def zeroed_lora(model, kept):
    """Stock LoRA on a zeroed stock model: base weights and LoRA factors of the removed decisions are zero."""
    base = zeroed(copy.deepcopy(model).unload(), kept)
    truth = get_peft_model(base, copy.deepcopy(model.peft_config["default"]), autocast_adapter_dtype=False)
    adapter = {name: tensor for name, tensor in model.state_dict().items() if "lora_" in name}
    truth.load_state_dict(adapter, strict=False)
    zero_lora(truth, kept)
    return truth.eval()


@pytest.mark.parametrize("tied", [False, True])
def test_stock_lora_cut_equals_zeroed_stock_lora(tied):
    model = stock_lora(tie_word_embeddings=tied)
    space = MaskSpace.from_config(model.config)
    mask = random_mask(space)
    truth = zeroed_lora(model, space.kept_indices(mask))
    cut = cut_model(model, space, mask)
    ids = tokens()
    with torch.no_grad():
        expected = truth(input_ids=ids).logits
        assert_close(cut(input_ids=ids).logits, expected, rtol=0, atol=1e-10)
        with cut.disable_adapter():
            assert (cut(input_ids=ids).logits - expected).abs().max() > 1e-2, "the adapter must matter in this test"


@pytest.mark.parametrize("space_name", ["head_dim", "kv_group", "disp"])
def test_masked_sum_equals_cut_with_the_custom_layer(space_name):
    model = stock_model()
    space = MaskSpace.from_config(model.config, space_name)
    masked = fill_lora(add_lora(model, space, r=3, alpha=6.0, dropout=0.0)).eval()
    mask = random_mask(space)
    ids = tokens()
    with torch.no_grad():
        with MaskController(masked, space).masks(mask, "sum"):
            expected = masked(input_ids=ids).logits
        cut = cut_model(masked, space, mask)
        # The adapter is float32 beside a float64 base.
        assert_close(cut(input_ids=ids).logits, expected, rtol=0, atol=1e-5)
    assert isinstance(cut.get_base_model().model.layers[0].mlp.up_proj, MaskedPeftLinear)


def test_wrapping_dtypes_flags_and_names_are_kept():
    model = stock_lora(torch.bfloat16)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.float()
        parameter.requires_grad_("lora_A" in name or "norm" in name)
    model.train()
    space = MaskSpace.from_config(model.config)
    cut = cut_model(model, space, random_mask(space))
    before = {name: (p.dtype, p.device, p.requires_grad) for name, p in model.named_parameters()}
    assert {name: (p.dtype, p.device, p.requires_grad) for name, p in cut.named_parameters()} == before
    assert type(cut) is peft.PeftModelForCausalLM and cut.training
    assert type(cut.get_base_model().model.layers[0].mlp.up_proj) is StockLora
    assert cut.peft_config["default"].r == 3 and cut.active_adapters == ["default"]


def test_optimizer_state_is_cut_like_its_parameter():
    model = stock_lora()
    space = MaskSpace.from_config(model.config)
    mask = random_mask(space)
    parameters = {n: p.detach() for n, p in model.named_parameters() if "lora_" in n}
    moments = {f"{n}.exp_avg": 2 * p for n, p in parameters.items()}
    steps = {f"{n}.step": torch.tensor(7.0) for n in parameters}
    cut = cut_state_dict(parameters | moments | steps, space, mask)
    for name in parameters:
        assert torch.equal(cut[f"{name}.exp_avg"], 2 * cut[name])
        assert cut[f"{name}.step"] == 7


def test_saved_adapter_reloads_with_stock_peft(tmp_path):
    model = stock_lora()
    space = MaskSpace.from_config(model.config)
    cut = cut_model(model, space, random_mask(space))
    cut.save_pretrained(tmp_path)
    ids = tokens()
    expected = cut(input_ids=ids).logits
    reloaded = peft.PeftModel.from_pretrained(copy.deepcopy(cut).unload(), tmp_path, autocast_adapter_dtype=False)
    assert torch.equal(reloaded(input_ids=ids).logits, expected)


def test_merge_equals_adapter_and_rounds_once():
    model = stock_lora(torch.bfloat16)
    layer = model.get_base_model().model.layers[1].self_attn.q_proj
    factors = layer.lora_B["default"].weight.double() @ layer.lora_A["default"].weight.double()
    expected = (layer.base_layer.weight.double() + 2.0 * factors).to(torch.bfloat16)
    merged = merge_adapter(model)
    weight = merged.model.layers[1].self_attn.q_proj.weight
    assert weight.dtype == torch.bfloat16
    # A float32 sum may fall on the other side of a bfloat16 tie, so not every weight needs to agree.
    assert (weight == expected).double().mean() > 0.99
    assert_close(weight, expected, rtol=2**-8, atol=0)


@pytest.mark.parametrize("tied", [False, True])
def test_merged_cut_model_equals_cut_with_adapter(tied):
    model = stock_lora(tie_word_embeddings=tied)
    space = MaskSpace.from_config(model.config)
    cut = cut_model(model, space, random_mask(space))
    ids = tokens()
    with torch.no_grad():
        expected = cut(input_ids=ids).logits
        merged = merge_adapter(cut)
        assert_close(merged(input_ids=ids).logits, expected, rtol=0, atol=1e-10)
        assert torch.equal(cut(input_ids=ids).logits, expected), "merging must leave the given model as it is"
    assert type(merged) is ATPLlamaForCausalLM and not any("lora" in name for name in merged.state_dict())
    assert (merged.lm_head.weight is merged.model.embed_tokens.weight) == tied


def test_merged_dora_is_that_of_peft():
    config = LoraConfig(r=3, lora_alpha=6, target_modules=TARGETS, task_type="CAUSAL_LM", use_dora=True)
    model = fill_lora(get_peft_model(stock_model(), config)).eval()
    merged, ids = merge_adapter(model), tokens()
    with torch.no_grad():
        assert_close(merged(input_ids=ids).logits, model(input_ids=ids).logits, rtol=0, atol=1e-10)
    assert merge_error(model, merged) <= 1
    for name, weight in copy.deepcopy(model).merge_and_unload().named_parameters():
        assert_close(merged.get_parameter(name), weight, rtol=1e-12, atol=1e-14, msg=name)
    with torch.no_grad():
        merged.model.layers[1].mlp.up_proj.weight[3, 4] *= 1 + 1e-9
    assert merge_error(model, merged) > 1


def test_other_adapters_are_refused():
    model = stock_lora()
    model.add_adapter("second", LoraConfig(r=2, target_modules=TARGETS))
    space = MaskSpace.from_config(model.config)
    with pytest.raises(ValueError, match="adapters default, second"):
        cut_model(model, space, random_mask(space))
    with pytest.raises(ValueError, match="adapters default, second"):
        merge_adapter(model)
    biased = get_peft_model(stock_model(), LoraConfig(r=2, target_modules=TARGETS, lora_bias=True))
    with pytest.raises(ValueError, match="not plain LoRA"):
        merge_adapter(biased)
    dora = get_peft_model(stock_model(), LoraConfig(r=2, target_modules=TARGETS, use_dora=True))
    with pytest.raises(ValueError, match="is DoRA, whose norms of whole rows no cut keeps: merge it first"):
        cut_model(dora, space, random_mask(space))
