"""What a family says of its model, against the model that transformers builds."""

import json
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from tiny_families import (
    EXPERTS,
    FAMILIES,
    LAYERS,
    SPACES,
    build,
    cut_as_masked,
    random_mask,
    space_of,
    tokens,
    with_adapter,
)
from torch.testing import assert_close
from transformers import AutoConfig, PretrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from atp.baselines.slicegpt import slice_model, sliced_width
from atp.config import ModelConfig
from atp.families import BLOCKS, UnsupportedModel, family_of
from atp.families import FAMILIES as TABLE
from atp.ground.errors import InputError
from atp.inputs.loading import load_model
from atp.lora import attention, decoder_layer
from atp.lora.decoder_layer import FusedRMSNorm, unfuse_layer
from atp.lora.layer import MaskedMLP, add_lora, stock_modules, unload
from atp.models.layers import first_layer_inputs, run_block
from atp.models.sizes import check_against_files, check_sizes
from atp.removal import cut_model
from atp.spaces import EXPERT_SPACES, space_names
from atp.spaces.space import MaskSpace
from atp.spaces.support import UNKNOWN, family_table, refused_list, support
from atp_kernels import add_rms_norm

UNGATED, LAYER_NORMS = ("arcee", "nemotron", "jais2", "starcoder2", "apertus"), ("nemotron", "jais2", "starcoder2")


def test_every_registered_family_is_tested():
    assert TABLE.keys() == FAMILIES.keys() | EXPERTS.keys()


def test_each_causal_lm_of_transformers_is_cut_or_refused_with_the_reason():
    """Of its own config, without weights; what the documentation says of it is what happens."""
    asked = 0
    for name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        said = support(name)
        if name in TABLE:
            config = build(name).config
            for space in space_names():
                exact = (name, space) in SPACES or (name in EXPERTS and space in EXPERT_SPACES)
                assert exact == (space in said.split(", "))
                if exact:
                    assert MaskSpace.from_config(config, space).size
                else:
                    has = "its MLPs are experts" if name in EXPERTS else "it has no experts"
                    reason = TABLE[name].inexact.get(space) or has
                    with pytest.raises(UnsupportedModel, match=re.escape(reason)):
                        MaskSpace.from_config(config, space)
        else:
            with pytest.raises(UnsupportedModel) as refused:
                family_of(SimpleNamespace(model_type=name))
            assert (said == UNKNOWN) != (f"because {said}: use one of" in str(refused.value))
        asked += name in TABLE
    assert asked == len(TABLE)


def test_the_documentation_lists_what_the_table_says():
    page = (Path(__file__).parents[3] / "docs/model.md").read_text(encoding="utf-8")
    assert family_table() in page and refused_list() in page


@pytest.mark.parametrize("name", FAMILIES)
def test_linears_biases_and_norms_are_those_of_the_stock_model(name):
    model = build(name)
    family, layer = family_of(model.config), model.model.layers[1]
    linears = {n: m for n, m in layer.named_modules() if isinstance(m, torch.nn.Linear)}
    described = family.linears(model.config)
    assert {n: (m.out_features, m.in_features, m.bias is not None) for n, m in linears.items()} == {
        n: (linear.out_features, linear.in_features, linear.bias) for n, linear in described.items()
    }
    norms = {n: m.weight.numel() for n, m in layer.named_modules() if "Norm" in type(m).__name__}
    assert family.norms(model.config) == norms
    counted = sum(p.numel() for p in layer.parameters())
    weights = sum(linear.out_features * (linear.in_features + linear.bias) for linear in described.values())
    assert counted == weights + sum(family.norm_params(model.config).values())


@pytest.mark.parametrize("name", FAMILIES)
@torch.no_grad()
def test_block_by_block_is_the_forward_of_the_stock_model_and_of_the_cut_one(name):
    """Also where layers have different masks and rows hold two samples, which do not see each other."""
    stock = build(name, torch.float64)
    space = MaskSpace.from_config(stock.config, space_of(name))
    positions = torch.cat([torch.arange(5), torch.arange(9)]).expand(3, -1)
    batch = {"input_ids": tokens(), "position_ids": positions}
    for model in (stock, cut_model(stock, space, random_mask(space))):
        decoder = model.get_decoder()
        x, arguments = first_layer_inputs(decoder, batch)
        for layer in decoder.layers:
            for block in family_of(model.config).blocks:
                x = run_block(layer, block, x, arguments)
        whole = decoder(**batch, use_cache=False).last_hidden_state
        assert_close(decoder.norm(x), whole, rtol=0, atol=1e-12)


@pytest.mark.parametrize(("name", "space_name"), SPACES)
def test_masked_layers_compute_what_the_cut_model_computes(name, space_name):
    """LoRA included; and slices of the base weights, with their biases, what masks compute."""
    model = build(name, torch.float64)
    space = MaskSpace.from_config(model.config, space_name)
    wrapped = with_adapter(model, space)
    with torch.no_grad():
        whole = wrapped(tokens()).logits
    _, found = cut_as_masked(wrapped, space, random_mask(space))
    assert (found["sum"] - whole).abs().max() > 0.01 and (found["base"] - found["sum"]).abs().max() > 0.01


@pytest.mark.parametrize("name", FAMILIES)
def test_norms_and_mlps_are_fused_and_come_back(name):
    model = build(name)
    before = {n: (type(m), id(m) if "norm" in n else None) for n, m in model.named_modules()}
    stock, logits = stock_modules(model), model(tokens()).logits
    wrapped = add_lora(model, MaskSpace.from_config(model.config, space_of(name)), r=2, alpha=2.0, dropout=0.0)
    for layer in wrapped.get_base_model().model.layers:
        assert isinstance(layer.mlp, MaskedMLP) == (name not in UNGATED)
        norms = [m for n, m in layer.named_modules() if n.endswith("norm")]
        assert norms and all(isinstance(n, FusedRMSNorm) == (name not in LAYER_NORMS) for n in norms)
    assert_close(wrapped(tokens()).logits, logits, rtol=1e-4, atol=1e-4)
    plain = unload(wrapped, stock)
    assert {n: (type(m), id(m) if "norm" in n else None) for n, m in plain.named_modules()} == before
    assert torch.equal(plain(tokens()).logits, logits)


@pytest.mark.parametrize("watched", [False, True])
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize(
    "name", [name for name in FAMILIES if TABLE[name].blocks is BLOCKS and name not in LAYER_NORMS]
)
def test_a_residual_connection_and_the_norm_after_it_are_one_operation(name, autocast, watched, monkeypatch):
    """Bit by bit what the layers of transformers compute around the same modules, where packs take no block."""
    model = build(name)
    wrapped = add_lora(model, MaskSpace.from_config(model.config, space_of(name)), r=2, alpha=2.0, dropout=0.0)
    generator = torch.Generator().manual_seed(1)
    for parameter in (p for n, p in wrapped.named_parameters() if "lora_B" in n):
        parameter.data = torch.randn(parameter.shape, generator=generator) / 4
    monkeypatch.setattr(decoder_layer, "attend_packed", lambda *given: None)
    monkeypatch.setattr(attention, "attend_packed", lambda *given: None)
    seen, calls = [], []
    monkeypatch.setattr(
        decoder_layer, "add_rms_norm", lambda *given, **options: calls.append(1) or add_rms_norm(*given, **options)
    )
    layers = wrapped.get_base_model().model.layers
    if watched:
        layers[0].post_attention_layernorm.register_forward_hook(lambda module, given, y: seen.append(y))

    def step():
        wrapped.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = wrapped(tokens(), labels=tokens(), use_cache=False).loss
        loss.backward()
        return {"loss": loss.detach()} | {n: p.grad for n, p in wrapped.named_parameters() if p.grad is not None}

    found = step()
    assert len(calls) == len(layers) - watched and len(seen) == watched
    for layer in layers:
        unfuse_layer(layer)
    expected = step()
    assert len(calls) == len(layers) - watched
    assert found.keys() == expected.keys() and len(found) > 10
    assert all(torch.equal(found[part], expected[part]) for part in found)


@pytest.mark.parametrize("name", FAMILIES)
def test_gradient_checkpointing_changes_no_gradient(name):
    model = build(name)
    space = MaskSpace.from_config(model.config, space_of(name))
    gradients = []
    for checkpointing in (False, True):
        cut = cut_model(model, space, random_mask(space)).train()
        if checkpointing:
            cut.gradient_checkpointing_enable({"use_reentrant": False})
        cut(tokens(), labels=tokens(), use_cache=False).loss.backward()
        gradients.append({n: p.grad.clone() for n, p in cut.named_parameters()})
        cut.zero_grad()
    assert all(torch.equal(gradient, gradients[1][n]) for n, gradient in gradients[0].items())


def test_keys_that_a_family_does_not_know_mean_nothing_after_the_cut():
    """A stray sliding_window or multiplier in the config.json of a Llama has no effect, before the cut or after it."""
    model = build("llama", torch.float64)
    plain = model(tokens()).logits
    strays = {"sliding_window": 3, "residual_multiplier": 0.5, "layer_types": None, "no_rope_layers": [0, 0, 0]}
    for key, value in strays.items():
        setattr(model.config, key, value)
    space = MaskSpace.from_config(model.config)
    cut = cut_model(model, space, torch.ones(space.size, dtype=torch.bool))
    assert torch.equal(cut(tokens()).logits, plain) and family_of(cut.config).windows(cut.config) is None
    assert not strays.keys() & cut.config.to_dict().keys()


@pytest.mark.parametrize("name", FAMILIES)
def test_sizes_of_every_family_are_checked(name):
    """If head_dim is given, Llama and Gemma alone want hidden_size to be a multiple of the heads."""
    config = build(name).config
    content = config.to_dict()
    check_sizes(content)
    check_against_files(config, 10**4)
    for key, value in (("hidden_size", 0), ("num_hidden_layers", True), ("num_key_value_heads", 3), ("head_dim", 7)):
        with pytest.raises(InputError, match=f"(num_attention_heads|{key}) is "):
            check_sizes(content | {key: value})
    free = content | {"hidden_size": 34, "head_dim": 8}
    if name in ("llama", "gemma2", "gemma3_text", "arcee", "jais2"):
        with pytest.raises(InputError, match="hidden_size is 34: make it a multiple of num_attention_heads 4"):
            check_sizes(free)
    else:
        check_sizes(free)
    config.intermediate_size = 2**22
    with pytest.raises(InputError, match="weights and its files hold 10,000 bytes"):
        check_against_files(config, 10**4)


REFUSED = {
    "gemma3": "give the language model alone, as a folder of model_type gemma3_text",
    "gemma4_text": "share keys and values",
    "llama4_text": "attention sees chunks",
    "deepseek_v2": "one latent vector",
    "qwen3_5_text": "recurrent state",
    "mllama": "wraps a language model",
    "falcon": "projections are fused",
    "phi": "run beside each other",
    "qwen2_moe": "experts",
    "gpt2": "'gpt2' is not supported: use one of llama, mistral, qwen2, qwen3, smollm3, granite",
}


@pytest.mark.parametrize("name", REFUSED)
def test_other_families_are_refused_with_the_reason_before_weights_are_read(name, tmp_path):
    """The folder has no weights at all, which would be the next complaint."""
    (tmp_path / "config.json").write_text(json.dumps(AutoConfig.for_model(name).to_dict(), default=str))
    with pytest.raises(UnsupportedModel, match=REFUSED[name]) as refused:
        load_model(ModelConfig(path=str(tmp_path)), "kv_group")
    assert "use one of llama" in str(refused.value) and str(refused.value).count("\n") == 0


def test_head_dim_is_refused_for_qwen3_with_the_reason():
    config = build("qwen3").config
    with pytest.raises(UnsupportedModel, match="'head_dim' does not fit model family 'qwen3': its RMSNorms over head"):
        MaskSpace.from_config(config, "head_dim")
    with pytest.raises(InputError, match="slicegpt does not fit model family 'qwen3'"):
        sliced_width(config, 0.5)


@pytest.mark.parametrize(
    ("space", "what"), [("head_dim", "the heads of layer 0 are narrower"), ("disp", "layer 0 reads")]
)
def test_cuts_below_whole_heads_are_not_cut_again(space, what):
    model = build("granite")
    table = MaskSpace.from_config(model.config, space)
    cut = cut_model(model, table, random_mask(table))
    assert family_of(cut.config).name == "granite"
    for again in ("kv_group", space):
        with pytest.raises(UnsupportedModel, match=f"the model is cut already and {what}.*give the model that it was"):
            MaskSpace.from_config(cut.config, again)


def test_a_sliced_model_is_not_cut_again():
    model = build("granite")
    bases = torch.eye(model.config.hidden_size)[None, :, :8].repeat(2 * LAYERS + 1, 1, 1)
    with pytest.raises(UnsupportedModel, match="its residual stream is sliced"):
        MaskSpace.from_config(slice_model(model, bases).config, "kv_group")


def test_a_foreign_config_is_refused_in_a_sentence():
    with pytest.raises(UnsupportedModel, match="model family '' is not supported"):
        family_of(PretrainedConfig())
