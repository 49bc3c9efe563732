"""The rows of a model: on the words it keeps it computes just what the whole one does."""

import math

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig

from atp.ground.errors import InputError
from atp.removal.certify import WORDS_CUT, failure
from atp.vocabulary.trim import trim_model, trimmed_config
from atp.vocabulary.vocabulary import Vocabulary, word_parameters, written

WORDS = 512
SIZES = {
    "vocab_size": WORDS, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": [2, 500],
}  # fmt: skip
MODELS = {
    "llama": {}, "llama-tied": {"tie_word_embeddings": True}, "gemma2": {"head_dim": 16},
    "granite": {"embedding_multiplier": 3.0, "logits_scaling": 0.25, "tie_word_embeddings": True},
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
}  # fmt: skip


def build(name="llama", dtype=torch.float32, **changes):
    torch.manual_seed(0)
    kind = name.partition("-")[0]
    return AutoModelForCausalLM.from_config(
        AutoConfig.for_model(kind, **SIZES | MODELS[name] | changes), dtype=dtype
    ).eval()


def kept_of(count=150, seed=3):
    drawn = torch.randperm(WORDS, generator=torch.Generator().manual_seed(seed))[:count]
    return torch.tensor(sorted({0, 1, 2, 500, *drawn.tolist()}))


def ids_of(kept, seed=4):
    return torch.randint(0, len(kept), (2, 24), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", MODELS)
def test_logits_of_kept_words_stay_bit_for_bit(name, dtype):
    model, kept = build(name, dtype), kept_of()
    ids = ids_of(kept)
    with torch.no_grad():
        expected, states = model(input_ids=kept[ids]).logits[..., kept], model.model(kept[ids]).last_hidden_state
        rows = model.get_output_embeddings().weight[kept]
        before = {n: p.clone() for n, p in model.named_parameters() if ".layers." in n}
        trim_model(model, kept)
        found = model(input_ids=ids).logits
        assert torch.equal(model.model(ids).last_hidden_state, states)
    assert torch.equal(model.get_output_embeddings().weight, rows)
    # Products of another shape may sum in another order.
    close = {"rtol": 1e-5, "atol": 1e-6} if dtype == torch.float32 else {"rtol": 2**-7, "atol": 2**-7}
    torch.testing.assert_close(found, expected, **close)
    assert found.shape == (2, 24, len(kept))
    assert Vocabulary(kept, None).trim(build(name, dtype), lambda: ids) == 0.0, "in products of one shape"
    assert all(torch.equal(before[n], p) for n, p in model.named_parameters() if n in before)
    tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert tied == bool(model.config.tie_word_embeddings)


def test_a_trimmed_model_is_saved_and_loaded_as_any_other(tmp_path):
    model, kept = build("llama-tied"), kept_of()
    trim_model(model, kept)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    ids = ids_of(kept)
    with torch.no_grad():
        assert torch.equal(loaded(input_ids=ids).logits, model(input_ids=ids).logits)
    assert loaded.config.vocab_size == len(kept) == loaded.get_input_embeddings().num_embeddings
    labels = loaded(input_ids=ids, labels=ids).loss
    assert torch.isfinite(labels), "its own loss takes the new size"


def test_ids_of_both_configs_are_renumbered_and_those_without_a_word_go():
    model, kept = build("llama", pad_token_id=500), kept_of()
    new = {old: index for index, old in enumerate(kept.tolist())}
    gone = next(index for index in range(WORDS) if index not in new)
    settings = model.generation_config
    settings.eos_token_id, settings.pad_token_id, settings.bos_token_id = [2, 500, gone], 0, gone
    settings.suppress_tokens, settings.bad_words_ids = [gone, 500], [[1, 2], [gone, 2]]
    model.config.decoder_start_token_id = WORDS + 7  # beyond the embedding
    trim_model(model, kept)
    config = model.config
    assert (config.vocab_size, model.vocab_size, model.model.vocab_size) == (len(kept),) * 3
    assert (config.pad_token_id, config.bos_token_id, config.eos_token_id) == (new[500], new[1], [new[2], new[500]])
    assert config.decoder_start_token_id is None
    assert (settings.eos_token_id, settings.pad_token_id, settings.bos_token_id) == ([new[2], new[500]], new[0], None)
    assert settings.suppress_tokens == [new[500]] and settings.bad_words_ids == [[new[1], new[2]]]
    assert model.model.embed_tokens.padding_idx == new[500]
    whole = LlamaConfig(**SIZES)
    trimmed = trimmed_config(whole, kept)
    assert trimmed.eos_token_id == [new[2], new[500]] and trimmed.vocab_size == len(kept) and whole.vocab_size == WORDS


def test_a_bias_of_the_head_goes_along():
    model, kept = build("llama"), kept_of()
    head = nn.Linear(64, WORDS, bias=True)
    model.lm_head = head
    ids = ids_of(kept)
    with torch.no_grad():
        expected = model(input_ids=kept[ids]).logits[..., kept]
        trim_model(model, kept)
        torch.testing.assert_close(model(input_ids=ids).logits, expected)
    assert model.lm_head.bias.shape == (len(kept),) and model.lm_head.out_features == len(kept)


def test_what_else_names_words_is_refused_before_anything_is_changed():
    model, kept = build("llama"), kept_of()
    model.extra = nn.Embedding(WORDS, 3)
    with pytest.raises(InputError, match="because extra.weight has a row for each word too: set vocabulary.keep=null"):
        trim_model(model, kept)
    assert model.config.vocab_size == WORDS and model.get_input_embeddings().num_embeddings == WORDS
    model = build("llama")
    model.generation_config.sequence_bias = [[[5], -1.0]]
    with pytest.raises(InputError, match="^generation_config.json of the model holds sequence_bias"):
        trim_model(model, kept)


def test_the_change_of_logits_is_measured_and_limited():
    model, kept = build("llama-tied", torch.bfloat16), kept_of()
    vocabulary = Vocabulary(kept, None)
    assert vocabulary.trim(model, lambda: ids_of(kept)) == 0.0 and failure({WORDS_CUT: 0.0}, ()) is None
    assert model.config.vocab_size == len(model.lm_head.weight) == len(kept), "as it was trimmed"
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert Vocabulary(kept, None).trim(build("llama")) is None
    for wrong in (1e-9, math.nan, None):
        assert failure({WORDS_CUT: wrong}, ()).startswith("vocabulary_gap is ")


def test_a_wrong_row_shows(monkeypatch):
    model, kept = build("llama"), kept_of()

    def trim(model, kept):
        trim_model(model, kept)
        model.lm_head.weight.data[[3, 4]] = model.lm_head.weight.data[[4, 3]]

    monkeypatch.setattr("atp.vocabulary.vocabulary.trim_model", trim)
    assert Vocabulary(kept, None).trim(model, lambda: ids_of(kept)) > 0


@pytest.mark.parametrize("name", ["llama", "llama-tied"])
def test_what_a_word_takes_is_what_its_rows_have(name):
    model = build(name)
    whole = sum(parameter.numel() for parameter in model.parameters())
    trim_model(model, torch.arange(WORDS - 1))
    assert whole - sum(parameter.numel() for parameter in model.parameters()) == word_parameters(model.config)


def test_kept_ids_are_written_and_read(tmp_path):
    path = tmp_path / "vocabulary.safetensors"
    assert written(path) is None
    Vocabulary(kept_of(), None).write(path)
    assert torch.equal(written(path), kept_of())
    path.write_bytes(path.read_bytes()[:-9])
    assert written(path) is None
