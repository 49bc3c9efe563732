"""The cut model against a stock model whose removed weights are zeroed by hand."""

import pytest
import torch
from torch.testing import assert_close
from zeroed import HEAD_DIM, HIDDEN, INNER, KV_HEADS, LAYERS, VOCAB, random_mask, stock_model, tokens, zeroed

from atp.models.config import LayerShape
from atp.removal.cut import cut_config, cut_model, cut_state_dict
from atp.spaces.space import MaskSpace

LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 10000.0, "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}  # fmt: skip
SLIDING = {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 1}  # all layers but the first
MULTIPLIERS = {
    "residual_multiplier": 0.22, "attention_multiplier": 0.4, "embedding_multiplier": 3.0, "logits_scaling": 0.125,
}  # fmt: skip
EXCEPT = ("qwen3", "head_dim")  # the norms of queries and keys are over all dimensions
MODELS = {
    "llama": {},
    "llama-tied": {"tie_word_embeddings": True},
    "llama-biases": {"attention_bias": True, "mlp_bias": True},
    "llama-rope-llama3": {"rope_parameters": LLAMA3},
    "llama-rope-linear": {"rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0}},
    "llama-rope-dynamic": {
        "rope_parameters": {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0},
        "max_position_embeddings": 12,
    },
    "mistral": {},
    "mistral-sliding": {"sliding_window": 6},
    "qwen2": {},
    "qwen2-tied": {"tie_word_embeddings": True},
    "qwen2-sliding": SLIDING,
    "qwen3": {},
    "qwen3-biases-sliding": SLIDING | {"attention_bias": True},
    "smollm3": {"no_rope_layers": [1, 0, 1], "tie_word_embeddings": False},
    "smollm3-biases-sliding": {
        "no_rope_layers": [0, 1, 0], "use_sliding_window": True, "sliding_window": 6, "attention_bias": True,
        "mlp_bias": True,
    },
    "granite": MULTIPLIERS,
    "granite-tied-biases": MULTIPLIERS | {"tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True},
}  # fmt: skip
SPACES = ("head_dim", "kv_group", "disp")
CASES = [(name, space) for name in MODELS for space in SPACES if (name[:5], space) != EXCEPT]


def cut_pair(name="llama", space_name="head_dim", dtype=torch.float64):
    """The zeroed stock model, the cut model, and what was decided."""
    model = stock_model(name.split("-")[0], dtype=dtype, **MODELS[name])
    space = MaskSpace.from_config(model.config, space_name)
    mask = random_mask(space)
    return zeroed(model, space.kept_indices(mask)), cut_model(model, space, mask), space, mask


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize(("name", "space_name"), CASES)
def test_logits_equal_the_zeroed_stock_model(name, space_name, attention):
    truth, cut, _, _ = cut_pair(name, space_name)
    truth.set_attn_implementation(attention)
    cut.set_attn_implementation(attention)
    ids = tokens()
    with torch.no_grad():
        expected, actual = truth(ids).logits, cut(ids).logits
    # RoPE and the eager softmax are float32 in transformers, so eager rounds there.
    tolerance = 1e-10 if attention == "sdpa" else 1e-5
    assert_close(actual, expected, rtol=0, atol=tolerance)
    assert expected.abs().max() > 0.1


@pytest.mark.parametrize("space_name", ["head_dim", "kv_group", "disp"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 0.05)])
def test_logits_in_lower_precision(space_name, dtype, tolerance):
    truth, cut, _, _ = cut_pair("llama-biases", space_name, dtype)
    ids = tokens()
    with torch.no_grad():
        expected, actual = truth(ids).logits, cut(ids).logits
    assert (actual - expected).abs().max() <= tolerance * expected.abs().max()


def test_a_cast_of_the_source_keeps_its_rope_frequencies():
    model = stock_model(dtype=torch.bfloat16)
    space = MaskSpace.from_config(model.config)
    cut = cut_model(model, space, random_mask(space))
    assert cut.model.rotary_emb.inv_freq.dtype == model.model.rotary_emb.inv_freq.dtype
    assert torch.equal(cut.model.rotary_emb.inv_freq, model.model.rotary_emb.inv_freq)


def test_gradients_of_kept_weights_equal_the_zeroed_stock_model():
    truth, cut, space, mask = cut_pair()
    ids = tokens()
    truth(ids, labels=ids).loss.backward()
    cut(ids, labels=ids).loss.backward()
    expected = cut_state_dict({name: p.grad for name, p in truth.named_parameters()}, space, mask)
    for name, parameter in cut.named_parameters():
        assert_close(parameter.grad, expected[name], rtol=0, atol=1e-10, msg=name)


@pytest.mark.parametrize(("name", "space_name"), [
    (name, space) for name, space in CASES if name.endswith(("tied", "sliding", "granite", "smollm3"))
])  # fmt: skip
def test_generate_with_and_without_cache(name, space_name):
    truth, cut, _, _ = cut_pair(name, space_name)
    # Left padding: the second prompt is three tokens shorter.
    ids = tokens(2, 9)
    ids[1, :3] = 0
    options = {"attention_mask": (ids != 0).long(), "max_new_tokens": 8, "do_sample": False, "eos_token_id": None}
    expected = truth.generate(ids, **options)
    assert expected.shape == (2, 17)
    for cache in ({}, {"use_cache": False}, {"cache_implementation": "static"}):
        assert torch.equal(cut.generate(ids, **options, **cache), expected), cache


def test_parameter_count_is_the_space_arithmetic():
    _, cut, space, mask = cut_pair("llama-tied")
    expected = VOCAB * HIDDEN + HIDDEN
    heads_per_group = 2
    for kept in space.kept_indices(mask):
        query_key = 2 * len(kept["qk"]) * KV_HEADS * (heads_per_group + 1)
        value_output = len(kept["vo"]) * KV_HEADS * (heads_per_group + 1)
        expected += HIDDEN * (query_key + value_output + 3 * len(kept["mlp"]) + 2)
    assert sum(p.numel() for p in cut.parameters()) == expected


def test_untouched_tensors_are_shared_and_dtype_kept():
    model = stock_model(dtype=torch.bfloat16)
    space = MaskSpace.from_config(model.config)
    cut = cut_model(model, space, random_mask(space))
    assert {p.dtype for p in cut.parameters()} == {torch.bfloat16}
    assert not any(tensor.is_meta for tensor in (*cut.parameters(), *cut.buffers()))
    assert cut.lm_head.weight.data_ptr() == model.lm_head.weight.data_ptr()
    assert cut.generation_config.to_dict() == model.generation_config.to_dict()


def test_tied_embeddings_stay_tied():
    _, cut, _, _ = cut_pair("llama-tied")
    assert cut.lm_head.weight is cut.model.embed_tokens.weight


def test_full_mask_changes_nothing():
    model = stock_model()
    space = MaskSpace.from_config(model.config)
    mask = torch.ones(space.size, dtype=torch.bool)
    ids = tokens()
    assert torch.equal(cut_model(model, space, mask)(ids).logits, model(ids).logits)
    cut = cut_config(model.config, space, mask)
    assert [cut.layer_shape(layer) for layer in range(LAYERS)] == [
        LayerShape(
            num_attention_heads=4, num_key_value_heads=2, qk_pairs=None, v_head_dim=HEAD_DIM, intermediate_size=INNER
        )
    ] * LAYERS  # fmt: skip


@pytest.mark.parametrize("structure", ["qk", "vo", "mlp"])
def test_empty_structure_is_refused(structure):
    model = stock_model()
    space = MaskSpace.from_config(model.config)
    mask = torch.ones(space.size, dtype=torch.bool)
    mask[next(s for s in space.layer(1) if s.name == structure).span] = False
    for call in (lambda: cut_model(model, space, mask), lambda: cut_state_dict(model.state_dict(), space, mask)):
        with pytest.raises(ValueError, match=f"layer 1 would keep none of its .* {structure} decisions"):
            call()


def test_wrong_masks_and_states_are_refused():
    model = stock_model()
    space = MaskSpace.from_config(model.config)
    mask = random_mask(space)
    with pytest.raises(ValueError, match="mask must be bool"):
        cut_state_dict({}, space, mask.float())
    with pytest.raises(ValueError, match="mask must be bool"):
        cut_state_dict({}, space, mask[:-1])
    cut = cut_state_dict(model.state_dict(), space, mask)
    with pytest.raises(ValueError, match="build the space from the config of this model"):
        cut_state_dict(cut, space, mask)
    name = "model.layers.0.self_attn.q_proj.lora_magnitude_vector.default.weight"
    with pytest.raises(ValueError, match="cannot cut 'model.layers.0.self_attn.q_proj.lora_magnitude"):
        cut_state_dict({name: torch.ones(32)}, space, mask)


def test_heads_that_keep_different_dimensions_are_refused():
    model = stock_model()
    space = MaskSpace.from_config(model.config)
    structure = next(s for s in space.structures if s.name == "vo")
    # A table whose value decisions own single rows of single heads cannot be one width a layer.
    structure.cuts[0].owner[0] = 1
    mask = torch.ones(space.size, dtype=torch.bool)
    mask[structure.start] = False
    with pytest.raises(ValueError, match="layer 0: the heads of self_attn.v_proj keep different dimensions"):
        cut_config(model.config, space, mask)
