"""Cut models whose blocks see a part of the residual stream: against plain arithmetic, saved, reloaded, refused."""

import json
from dataclasses import asdict

import pytest
import torch
from test_llama import SIZES as PLAIN
from test_llama import tokens
from torch.testing import assert_close
from transformers import AutoModelForCausalLM

from atp.models import ATPLlamaConfig, register
from atp.models.config import config_class
from atp.models.cut import build as build_cut

SIZES = PLAIN | {"attention_bias": True, "mlp_bias": True}
WHOLE = {"num_attention_heads": 4, "num_key_value_heads": 2, "qk_pairs": None, "v_head_dim": 8, "intermediate_size": 40}
SELECTED = WHOLE | {
    "intermediate_size": 7, "attention_inputs": [0, 5, 31], "attention_outputs": [2, 3, 4, 30], "mlp_inputs": [1, 2],
    "mlp_outputs": [31],
}  # fmt: skip
VALUES = {"v_head_dim": 8}  # which the whole config leaves open
UNSELECTED = dict.fromkeys(SELECTED.keys() - WHOLE.keys()) | {"skip": ()}
SHAPES = [SELECTED, WHOLE | {"mlp_outputs": list(range(0, 32, 2))}]
register()


def build(shapes=SHAPES, family="llama", **overrides):
    torch.manual_seed(0)
    values = SIZES | {"per_layer_config": dict(enumerate(shapes))} | overrides
    model = build_cut(config_class(family)(**values)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias") or "norm" in name:
                parameter.add_(0.3 * torch.randn_like(parameter))
    return model


@pytest.mark.parametrize("multiplier", [1.0, 0.25])
@torch.no_grad()
def test_a_layer_reads_and_writes_its_positions_by_hand(multiplier):
    """The MLP block of the first layer in plain indexing; the stream at other positions passes unchanged."""
    layer = build(family="granite", residual_multiplier=multiplier).double().model.layers[0]
    x = torch.randn(2, 3, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    added = torch.zeros_like(x)
    layer.self_attn.forward = lambda hidden_states, **_: (hidden_states.sum(-1, keepdim=True).expand(2, 3, 4), None)
    normed = layer.input_layernorm(x)
    added[..., SELECTED["attention_outputs"]] = normed[..., SELECTED["attention_inputs"]].sum(-1, keepdim=True)
    middle = x + multiplier * added
    mlp, read = layer.mlp, layer.post_attention_layernorm(middle)[..., SELECTED["mlp_inputs"]]
    gate = read @ mlp.gate_proj.weight.T + mlp.gate_proj.bias
    up = read @ mlp.up_proj.weight.T + mlp.up_proj.bias
    down = (gate * torch.sigmoid(gate) * up) @ mlp.down_proj.weight.T + mlp.down_proj.bias
    expected = middle.clone()
    expected[..., 31] += multiplier * down[..., 0]
    assert mlp.down_proj.weight.shape == (1, 7) and mlp.gate_proj.weight.shape == (7, 2)
    assert_close(layer(x), expected, rtol=0, atol=1e-12)
    untouched = [i for i in range(32) if i not in (*SELECTED["attention_outputs"], 31)]
    assert torch.equal(layer(x)[..., untouched], x[..., untouched])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tied", [False, True])
def test_save_reload_and_generate(tmp_path, tied, dtype):
    model = build(tie_word_embeddings=tied)
    for parameter in model.parameters():  # not the RoPE frequencies, which a load leaves in float32
        parameter.data = parameter.to(dtype)
    model.save_pretrained(tmp_path, safe_serialization=True)
    written = json.loads((tmp_path / "config.json").read_text())
    assert written["per_layer_config"] == {
        "0": {key: value for key, value in SELECTED.items() if key not in WHOLE or key == "intermediate_size"} | VALUES,
        "1": {"mlp_outputs": list(range(0, 32, 2))} | VALUES,
    }, "what is selected whole needs no key"
    again = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype).eval()
    with torch.no_grad():
        assert torch.equal(again(tokens()).logits, model(tokens()).logits)
    greedy = {"do_sample": False, "max_new_tokens": 6, "eos_token_id": None}
    cached, plain = (again.generate(tokens(), use_cache=use, **greedy) for use in (True, False))
    assert cached.shape == (2, 18)
    assert dtype == torch.bfloat16 or torch.equal(cached, plain)


def test_gradients_reach_only_selected_positions_and_checkpointing_keeps_them():
    found = []
    for checkpointing in (False, True):
        model = build().train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        model(tokens(), labels=tokens(), use_cache=False).loss.backward()
        found.append({name: p.grad for name, p in model.named_parameters()})
    assert all(torch.equal(grad, found[1][name]) for name, grad in found[0].items())
    norm = found[0]["model.layers.0.input_layernorm.weight"]
    assert norm.nonzero().flatten().tolist() == SELECTED["attention_inputs"]


def test_under_autocast_the_residual_stream_keeps_its_dtype():
    model, seen = build(), []
    for layer in model.model.layers:
        layer.register_forward_hook(lambda module, args, output: seen.append(output.dtype))
    with torch.no_grad():
        exact = model(tokens()).logits
        with torch.autocast("cpu", torch.bfloat16):
            found = model(tokens()).logits
    assert seen == [torch.float32] * 4
    assert (found - exact).abs().max() < 0.05 * exact.abs().max()


def test_old_configs_and_models_without_selections_are_as_they_were():
    old = ATPLlamaConfig.from_dict(SIZES | {"model_type": "atp_llama", "layer_shapes": [WHOLE, WHOLE]})
    assert not set(SELECTED) - set(WHOLE) & set(old.to_dict()["per_layer_config"])
    assert old.layer_shape(0).mlp_inputs is None and old.layer_shape(0).selected("mlp_inputs", 32) == 32
    expected = WHOLE | UNSELECTED | {"num_experts": None, "moe_intermediate_size": None}
    assert asdict(ATPLlamaConfig(**SIZES).layer_shape(1)) == asdict(old.layer_shape(1)) == expected


RISING, TYPE = "distinct, rising and below hidden_size = 32", "doesn.t match any type"
WRONG = {RISING: ([3, 2], [2, 2], [-1, 2], [31, 32]), TYPE: ([1.0, 2.0], ["1", 2], [True], "12"), "at least one": ([],)}


@pytest.mark.parametrize(
    ("message", "positions"), [(message, one) for message, each in WRONG.items() for one in each], ids=str
)
@pytest.mark.parametrize("key", ["attention_inputs", "attention_outputs", "mlp_inputs", "mlp_outputs"])
def test_wrong_selections_name_layer_and_key(key, message, positions):
    with pytest.raises(Exception, match=rf"(?s)per_layer_config\[1\].*{key}.*{message}"):
        ATPLlamaConfig(**SIZES | {"per_layer_config": {1: {key: positions}}})
