"""`atp export`: which model it takes, where it writes, and what it refuses before it writes anything."""

import resource
import sys
from contextlib import contextmanager

import pytest
import torch
from huggingface_hub import ModelCard, ModelCardData
from test_gguf import assert_same_logits, tiny
from tiny_tokenizers import byte_level
from transformers import GPT2Config, GPT2LMHeadModel

from atp.cli.cli import main
from atp.export import gguf
from atp.export.command import TARGETS, export
from atp.export.gguf import DTYPES
from atp.export.quantized import SCHEMES
from atp.ground.ending import ending
from atp.ground.errors import InputError
from benchmarks.gguf_forward import File


def save(folder, widths="unequal", **metadata):
    """A model folder; returns the model."""
    model = tiny("llama", widths)
    model.save_pretrained(folder)
    byte_level().save_pretrained(folder)
    if metadata:
        ModelCard(f"---\n{ModelCardData(**metadata).to_yaml()}\n---\n# A model\n").save(folder / "README.md")
    return model


@pytest.fixture
def run(tmp_path):
    """What a finished run leaves, as far as an export reads it."""
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "config.yaml").write_text("model: {path: elsewhere}\n", encoding="utf-8")
    save(folder / "model", license="apache-2.0", base_model="someone/Small", language=["en", "de"])
    return folder


def contents(folder):
    return sorted(path.name for path in folder.iterdir())


def test_a_run_by_the_command(run, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["atp", "export", str(run), "--to", "gguf", "--dtype", "q8_0", "--debug"])
    with pytest.raises(SystemExit) as done:
        main()
    assert done.value.code == 0
    out = capsys.readouterr().out
    assert [line[9:] for line in out.splitlines()[:3]] == ["starting", "loading", "writing"]
    assert "llama.cpp's architecture deci" in out and f"exported: {run / 'model-q8_0.gguf'}" in out.replace("\n", "")
    keys = File(run / "model-q8_0.gguf").keys
    facts = {"general.name": "run", "general.license": "apache-2.0", "general.languages": ["en", "de"]}
    assert {key: keys[key] for key in facts} == facts and keys["general.base_model.0.name"] == "Small"


def test_quiet_leaves_the_result_alone(run, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["atp", "export", str(run), "--quiet"])
    with pytest.raises(SystemExit):
        main()
    out, err = capsys.readouterr()
    first, *_, last = out.splitlines()
    assert first.startswith("llama.cpp's architecture") and last.startswith("exported: ") and err == ""


@pytest.mark.parametrize("widths", ["whole", "unequal"])
def test_a_model_folder(tmp_path, widths):
    model = save(tmp_path / "mine", widths)
    path, remarks = export(str(tmp_path / "mine"), "gguf", "f32", None)
    assert path == tmp_path / "mine-f32.gguf" and len(remarks) == 1
    file = File(path)
    assert_same_logits(file, model, 1e-5)
    assert file.keys["general.name"] == "mine" and "general.license" not in file.keys


def test_weights_keep_the_dtype_of_their_files(tmp_path, monkeypatch):
    model = save(tmp_path / "mine")
    model.to(torch.bfloat16).save_pretrained(tmp_path / "mine")
    seen = []
    original = TARGETS["gguf"].write
    monkeypatch.setitem(
        TARGETS, "gguf", type(TARGETS["gguf"])(("bf16",), ".gguf", lambda source, dtype, out: seen.append(source) or [])
    )
    export(str(tmp_path / "mine"), "gguf", None, tmp_path / "a.gguf")
    assert seen[0].load().dtype == torch.bfloat16
    original(seen[0], "bf16", tmp_path / "b.gguf")
    weight = model.state_dict()["model.layers.0.mlp.up_proj.weight"].float()
    assert torch.equal(File(tmp_path / "b.gguf").tensors["blk.0.ffn_up.weight"], weight)


def test_the_default_dtype_is_the_first(tmp_path):
    save(tmp_path / "mine")
    path, _ = export(str(tmp_path / "mine"), "gguf", None, tmp_path / "x.gguf")
    assert path.name == "x.gguf" and TARGETS["gguf"].dtypes == tuple(DTYPES) and next(iter(DTYPES)) == "f16"
    assert TARGETS.keys() == {"gguf", *SCHEMES}
    assert File(path).types["token_embd.weight"] == "F16"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"to": "onnx"}, "--to onnx is unknown: use gguf"),
        ({"dtype": "int3"}, "--dtype int3 does not exist for gguf: use one of f16, f32, bf16, q8_0, q4_1"),
        ({"out": "run/config.yaml"}, "config.yaml exists already: choose another --out"),
        ({"out": "no/such.gguf"}, "folder .*no of --out does not exist"),
        ({"source": "absent"}, "cannot load the model from '.*absent'"),
    ],
)
def test_options_are_refused(run, tmp_path, options, message):
    values = {"source": "run", "to": "gguf", "dtype": "f32", "out": "x.gguf"} | options
    values |= {"source": str(tmp_path / values["source"]), "out": tmp_path / values["out"]}
    with pytest.raises(InputError, match=message):
        export(**values)
    assert contents(tmp_path) == ["run"] and contents(run) == ["config.yaml", "model"]


@contextmanager
def no_file_beyond(size):
    """What a full disk is to whoever writes: no file of this process grows beyond so many bytes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("missing", [1, 100, 5000, 100_000])
def test_a_disk_that_takes_no_more_leaves_no_file_and_is_told_with_the_place(tmp_path, missing):
    save(tmp_path / "mine")
    whole, _ = export(str(tmp_path / "mine"), "gguf", "f32", tmp_path / "whole.gguf")
    with no_file_beyond(whole.stat().st_size - missing), pytest.raises(OSError) as caught:
        export(str(tmp_path / "mine"), "gguf", "f32", tmp_path / "short.gguf")
    said, code = ending(caught.value)
    assert code == 1 and f"File too large: '{tmp_path / 'short.gguf'}'" in said
    assert contents(tmp_path) == ["mine", "whole.gguf"]


def test_two_exports_to_one_file_leave_one_of_them_whole(tmp_path, monkeypatch):
    save(tmp_path / "mine")
    expected, _ = export(str(tmp_path / "mine"), "gguf", "f32", tmp_path / "alone.gguf")
    quantize, begun = gguf.quantize, []

    def while_another_writes(values, held):
        if not begun:
            begun.append(True)
            export(str(tmp_path / "mine"), "gguf", "q8_0", tmp_path / "x.gguf")
        return quantize(values, held)

    monkeypatch.setattr(gguf, "quantize", while_another_writes)
    export(str(tmp_path / "mine"), "gguf", "f32", tmp_path / "x.gguf")
    assert begun and (tmp_path / "x.gguf").read_bytes() == expected.read_bytes()
    assert contents(tmp_path) == ["alone.gguf", "mine", "x.gguf"]


def test_what_a_killed_export_left_makes_room_for_the_next(tmp_path):
    save(tmp_path / "mine")
    (tmp_path / ".writing-0123456789abcdef-x.gguf").write_text("half")
    export(str(tmp_path / "mine"), "gguf", "f32", tmp_path / "x.gguf")
    assert contents(tmp_path) == ["mine", "x.gguf"]


def test_a_run_without_a_model_is_refused(tmp_path):
    (tmp_path / "config.yaml").write_text("", encoding="utf-8")
    with pytest.raises(
        InputError, match="no model yet: it stopped before its first step: continue it with atp train .* --resume"
    ):
        export(str(tmp_path), "gguf", "f32", None)


def test_another_family_is_refused(tmp_path):
    config = GPT2Config(vocab_size=16, n_embd=8, n_layer=1, n_head=1, n_positions=32, bos_token_id=1, eos_token_id=1)
    GPT2LMHeadModel(config).save_pretrained(tmp_path / "gpt2")
    with pytest.raises(InputError, match="model family 'gpt2' is not supported"):
        export(str(tmp_path / "gpt2"), "gguf", "f32", None)


def test_weights_that_are_not_finite_are_refused(tmp_path):
    model = save(tmp_path / "mine")
    with torch.no_grad():
        model.model.layers[2].mlp.up_proj.weight[0, 0] = torch.inf
    model.save_pretrained(tmp_path / "mine")
    with pytest.raises(InputError, match="layers.2.mlp.up_proj.weight holds NaN or infinity"):
        export(str(tmp_path / "mine"), "gguf", "f32", None)
    assert contents(tmp_path) == ["mine"]
