"""The classes of cut models as citizens of transformers: uncut equal to stock, any widths load, train and save."""

import json

import pytest
import torch
from torch.testing import assert_close
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from atp.evaluation.inference import cache_name
from atp.models import ATPLlamaConfig, ATPLlamaForCausalLM, ATPLlamaModel, register
from atp.models.config import config_class
from atp.models.cut import build
from benchmarks.case import Variant
from benchmarks.measure import peak_bytes

SIZES = {
    "vocab_size": 61, "hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64, "initializer_range": 0.2, "pad_token_id": 0,
}  # fmt: skip
SHAPES = [
    dict(num_attention_heads=4, num_key_value_heads=2, qk_pairs=[0, 2, 3], v_head_dim=5, intermediate_size=7),
    dict(num_attention_heads=3, num_key_value_heads=1, qk_pairs=None, v_head_dim=8, intermediate_size=33),
]
LAYERS = dict(enumerate(SHAPES))
WRITTEN = {
    "0": {"qk_pairs": [0, 2, 3], "v_head_dim": 5, "intermediate_size": 7},
    "1": {"num_attention_heads": 3, "num_key_value_heads": 1, "v_head_dim": 8, "intermediate_size": 33},
}
register()


def uneven(seed=0, family="llama", **overrides):
    torch.manual_seed(seed)
    return build(config_class(family)(**SIZES | {"per_layer_config": LAYERS} | overrides)).eval()


def tokens(windows=2, length=12):
    return torch.randint(1, 61, (windows, length), generator=torch.Generator().manual_seed(4))


STOCK = {
    "llama": {},
    "llama-tied-biases": {"tie_word_embeddings": True, "attention_bias": True},
    "mistral": {"sliding_window": None},
    "mistral-sliding": {"sliding_window": 5},
    "qwen2": {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1},
    "qwen3": {"attention_bias": True},
    "smollm3": {"no_rope_layers": [1, 0]},
    "granite": {"logits_scaling": 2.0, "embedding_multiplier": 3.0},
    "seed_oss": {},
}


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", STOCK)
def test_uncut_equals_stock_exactly(name, attention):
    options, family = STOCK[name], name.partition("-")[0]
    torch.manual_seed(0)
    stock = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **SIZES | options)).eval()
    ours = build(config_class(family)(**SIZES | options)).eval()
    ours.load_state_dict(stock.state_dict())
    stock.set_attn_implementation(attention)
    ours.set_attn_implementation(attention)
    ids = tokens()
    expected, actual = stock(ids, labels=ids), ours(ids, labels=ids)
    assert torch.equal(actual.logits, expected.logits)
    assert torch.equal(actual.loss, expected.loss)
    assert torch.equal(ours(ids, logits_to_keep=3).logits, stock(ids, logits_to_keep=3).logits)
    assert sum(p.numel() for p in ours.parameters()) == sum(p.numel() for p in stock.parameters())
    assert ours.state_dict().keys() == stock.state_dict().keys()


def test_sdpa_equals_eager_attentions_come_out_and_the_cache_holds_the_cut_widths():
    model = uneven()
    ids = tokens()
    fused = model(ids).logits
    model.set_attn_implementation("eager")
    output = model(ids, output_attentions=True, output_hidden_states=True)
    assert_close(output.logits, fused, rtol=0, atol=1e-5)
    assert [a.shape for a in output.attentions] == [(2, 4, 12, 12), (2, 3, 12, 12)]
    assert len(output.hidden_states) == 3
    model = uneven()
    cache = getattr(model(tokens(), use_cache=True), cache_name(model))
    assert cache.layers[0].keys.shape == (2, 2, 12, 6) and cache.layers[0].values.shape == (2, 2, 12, 5)
    assert cache.layers[1].keys.shape == (2, 1, 12, 8)


@torch.no_grad()
def test_only_logits_that_are_scaled_exist_twice():
    ids, logits = tokens(4, 32), 4 * 32 * 4096 * 4
    peaks = {}
    for scaling in (1.0, 2.0):
        model = uneven(family="llama" if scaling == 1 else "granite", vocab_size=4096)
        assert scaling == 1 or setattr(model, "logits_scaling", scaling) is None
        peaks[scaling] = peak_bytes(Variant(lambda model=model: model(ids, use_cache=False).logits), "forward", "cpu")
    assert logits < peaks[1.0] < 1.2 * logits and peaks[2.0] == pytest.approx(2 * logits, rel=0.1)
    halved, whole = (uneven(family="granite", logits_scaling=scaling)(ids).logits for scaling in (2.0, 1.0))
    assert torch.equal(2 * halved, whole)


@pytest.mark.parametrize("tied", [False, True])
def test_save_and_reload_is_identical(tmp_path, tied):
    model = uneven(tie_word_embeddings=tied)
    model.save_pretrained(tmp_path)
    assert {file.suffix for file in tmp_path.iterdir()} == {".json", ".safetensors"}
    written = json.loads((tmp_path / "config.json").read_text())
    assert written["per_layer_config"] == WRITTEN, "what a layer shares with the whole config needs no key"
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(reloaded) is ATPLlamaForCausalLM
    assert AutoConfig.from_pretrained(tmp_path).to_dict() == model.config.to_dict() | {
        "_name_or_path": str(tmp_path),
        "transformers_version": model.config.to_dict()["transformers_version"],
    }
    ids = tokens()
    assert torch.equal(reloaded(ids).logits, model(ids).logits)
    assert "AutoModelForCausalLM" not in AutoConfig.from_pretrained(tmp_path).auto_map, "TRL asks it so, given a path"
    decoder = AutoModel.from_pretrained(tmp_path)
    assert type(decoder) is ATPLlamaModel
    assert torch.equal(decoder(ids).last_hidden_state, model.model(ids).last_hidden_state)


@torch.no_grad()
@pytest.mark.parametrize("skip", [["attention"], ["mlp"], ["attention", "mlp"]], ids=str)
@pytest.mark.parametrize("family", ["llama", "mistral", "granite"])
def test_a_skipped_block_adds_nothing(tmp_path, family, skip):
    """As a block whose last linear is zero; also where the first layer has no attention and the cache starts there."""
    options = {"sliding_window": 4} if family == "mistral" else {}
    model = uneven(family=family, per_layer_config={0: {"skip": skip, "intermediate_size": 7}}, **options)
    whole = uneven(family=family, per_layer_config={0: {"intermediate_size": 7}}, **options)
    whole.load_state_dict(model.state_dict(), strict=False)
    layer = whole.model.layers[0]
    for block, linear in (("attention", layer.self_attn.o_proj), ("mlp", layer.mlp.down_proj)):
        if block in skip:
            linear.weight.zero_()
    assert torch.equal(model(tokens()).logits, whole(tokens()).logits)
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert not any("layers.0.self_attn" in name for name in again.state_dict()) or "attention" not in skip
    greedy = {"do_sample": False, "max_new_tokens": 8, "eos_token_id": None}
    expected = whole.generate(tokens(), use_cache=False, **greedy)
    for cache in ({}, {"cache_implementation": "static", "disable_compile": True}):
        assert torch.equal(again.generate(tokens(), **greedy, **cache), expected)
    assert (
        model.config.lacking() == f"layer 0 has no {' and no '.join(skip)}"
        and model.config.beyond_whole_heads() is None
    )


def test_bfloat16_reload(tmp_path):
    uneven().save_pretrained(tmp_path / "wide")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "wide", dtype=torch.bfloat16)
    model.save_pretrained(tmp_path / "narrow")
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path / "narrow", dtype="auto")
    assert {p.dtype for p in reloaded.parameters()} == {torch.bfloat16}
    assert reloaded.model.rotary_emb.inv_freq.dtype == torch.float32
    assert torch.equal(reloaded(tokens()).logits, model(tokens()).logits)


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_gives_equal_gradients(reentrant):
    plain, checkpointed = uneven().train(), uneven().train()
    checkpointed.gradient_checkpointing_enable({"use_reentrant": reentrant})
    ids = tokens()
    calls = []
    checkpointed.model.layers[0].mlp.register_forward_pre_hook(lambda *_: calls.append(1))
    for model in (plain, checkpointed):
        model(ids, labels=ids, use_cache=False).loss.backward()
    assert len(calls) == 2, "the layer must run again in the backward pass"
    for (name, expected), actual in zip(plain.named_parameters(), checkpointed.parameters(), strict=True):
        assert expected.grad.abs().max() > 0, name
        assert torch.equal(actual.grad, expected.grad), name


@pytest.mark.parametrize(
    ("layer", "change", "message"),
    [
        (0, {"intermediate_size": 0}, r"per_layer_config\[0\].intermediate_size is 0"),
        (1, {"num_attention_heads": 3, "num_key_value_heads": 2}, r"per_layer_config\[1\].num_attention_heads is 3"),
        (0, {"qk_pairs": []}, r"per_layer_config\[0\].qk_pairs is \[\]: a layer keeps at least one"),
        (1, {"qk_pairs": [1, 4]}, r"below head_dim / 2 = 4"),
        (1, {"qk_pairs": [2, 1]}, r"rising"),
        (0, {"width": 3}, "width"),
        (0, {"intermediate_size": "7"}, r"per_layer_config\[0\].*intermediate_size"),
    ],
)
def test_wrong_shapes_are_refused(layer, change, message):
    shapes = [dict(shape) for shape in SHAPES]
    shapes[layer].update(change)
    with pytest.raises(Exception, match=message):
        ATPLlamaConfig(**SIZES, per_layer_config=dict(enumerate(shapes)))


def test_number_of_layers_must_agree_and_norms_of_queries_and_keys_are_over_all_pairs():
    with pytest.raises(Exception, match=r"per_layer_config.*got \[2\]"):
        ATPLlamaConfig(**SIZES, per_layer_config=LAYERS | {2: SHAPES[0]})
    smollm3 = config_class("smollm3")
    with pytest.raises(Exception, match="no_rope_layers describes 1 layers and num_hidden_layers is 2"):
        smollm3(**SIZES, per_layer_config=LAYERS, layer_types=["full_attention"] * 2, no_rope_layers=[1])
    longer = smollm3(**SIZES, per_layer_config=LAYERS, no_rope_layers=[1, 0, 1])
    assert [longer.uses_rope(layer) for layer in range(2)] == [True, False]
    with pytest.raises(Exception, match=r"per_layer_config\[0\].qk_pairs is .*qk_norm keeps all pairs"):
        config_class("qwen3")(**SIZES, per_layer_config=LAYERS)


FACTORS = ["attention_multiplier", "residual_multiplier", "embedding_multiplier", "logits_scaling"]


@pytest.mark.parametrize("key", FACTORS)
@pytest.mark.parametrize("value", [0, float("nan"), float("inf"), -(10**400), 10**30, "1", []])
def test_a_factor_that_is_no_usual_number_is_refused(key, value):
    granite = config_class("granite")
    with pytest.raises(Exception, match=key):
        granite(**{key: value})
    assert getattr(granite(**{key: 0.22}), key) == 0.22
