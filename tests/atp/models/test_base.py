"""A base in 4 or 8 bits: which weights it is, what is refused, and a whole run over it that is taken up again."""

import json
import sys

import pytest
import torch
from tiny_command import read, results, start, stopping_at
from tiny_inputs import changed, tiny_config

from atp.evaluation import model_size
from atp.ground.errors import InputError
from atp.inputs.checks import check_reachable
from atp.inputs.loading import load_model, load_shapes
from atp.models.base import FORMS
from atp.models.load import read_model
from atp.processes import processes
from atp.processes.finite import refuse_weights
from atp.run import Run
from atp.spaces.space import MaskSpace
from atp.studies.compare.baseline_run import BaselineRun
from atp.training.resume import fingerprints
from atp.training.trainer import ATPTrainer
from atp_kernels import QuantizedWeight


@pytest.fixture(scope="module")
def wide(tmp_path_factory):
    return tiny_config(tmp_path_factory.mktemp("inputs"), hidden_size=64, intermediate_size=128)


def loaded(config, *overrides):
    return load_model(changed(config, *overrides).model, config.decisions.space)


@pytest.mark.parametrize("load_in", FORMS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_decoder_linears_are_quantized_and_nothing_else(wide, load_in, dtype):
    whole = loaded(wide, f"model.dtype={dtype}")
    model = loaded(wide, f"model.dtype={dtype}", f"model.load_in={load_in}")
    rest = dict(whole.named_parameters())
    linears = MaskSpace.from_config(whole.config, "kv_group").linears[0]
    seen = 0
    for name, parameter in model.named_parameters():
        assert parameter.shape == rest[name].shape and parameter.dtype == getattr(torch, dtype)
        if not name.endswith("_proj.weight"):
            assert torch.equal(parameter, rest[name])
            continue
        assert isinstance(parameter, QuantizedWeight) and not parameter.requires_grad
        assert torch.equal(parameter.dequantize(), FORMS[load_in].make(rest[name]).dequantize())
        assert parameter.nbytes == FORMS[load_in].bytes_of(linears[name.split(".", 3)[3].removesuffix(".weight")])
        seen += 1
    assert seen == 2 * 7
    refuse_weights(model)
    assert model_size(model) == model_size(whole), "as a file holds it"


def test_fingerprints_and_logits_are_of_the_quantized_weights(wide):
    plain, four, again, eight = (
        fingerprints(loaded(wide, *given))["base weights"]
        for given in ((), ["model.load_in=4bit"], ["model.load_in=4bit"], ["model.load_in=8bit"])
    )
    assert four == again and len({plain, four, eight}) == 3
    model = loaded(wide, "model.load_in=4bit")
    tokens = torch.arange(9)[None]
    found = model(tokens).logits
    for layer in model.get_decoder().layers:
        for module in layer.modules():
            if type(module) is torch.nn.Linear:
                module.weight = torch.nn.Parameter(module.weight.dequantize())
    assert torch.equal(model(tokens).logits, found)


REFUSED = {
    ("model.load_in=2bit",): "config key 'model.load_in' is '2bit'",
}


@pytest.mark.parametrize("overrides", REFUSED)
def test_what_is_not_supported_is_refused_before_anything_is_written(wide, tmp_path, overrides):
    with pytest.raises(InputError, match=REFUSED[overrides]):
        Run(changed(wide, *overrides, f"output_dir={tmp_path / 'run'}"), resume=False, command="").execute()
    assert not list(tmp_path.iterdir())


def test_without_whole_blocks_or_bitsandbytes_4_bits_are_refused(config, tmp_path, wide, monkeypatch):
    narrow = changed(config, "model.load_in=4bit", f"output_dir={tmp_path / 'run'}")
    with pytest.raises(InputError, match=r"multiple of 64 inputs, but layers.0.self_attn.q_proj has 32: use .*=8bit"):
        Run(narrow, resume=False, command="").execute()
    assert not list(tmp_path.iterdir())
    assert isinstance(loaded(config, "model.load_in=8bit"), torch.nn.Module)
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    given = changed(wide, "model.load_in=4bit", f"output_dir={tmp_path / 'run'}")
    with pytest.raises(InputError, match="package 'bitsandbytes' is not installed: run pip install 'bitsandbytes>=0"):
        Run(given, resume=False, command="").execute()
    assert not list(tmp_path.iterdir())


def test_several_processes_are_refused(wide, monkeypatch):
    given = changed(wide, "model.load_in=8bit")
    check_reachable(given, load_shapes(given.model))
    monkeypatch.setattr(processes, "count", lambda: 2)
    with pytest.raises(InputError, match="model.load_in=8bit trains in one process, not in 2: start without torchrun"):
        check_reachable(given, load_shapes(given.model))


@pytest.mark.parametrize("method", ["llm_pruner", "dense_lora"])
def test_baselines_are_refused(wide, tmp_path, method):
    given = changed(wide, "model.load_in=8bit", f"output_dir={tmp_path / 'run'}")
    with pytest.raises(InputError, match=f"{method} does not run on a quantized base: leave out model.load_in=8bit"):
        BaselineRun(method, given, resume=False, command="").execute()
    assert not list(tmp_path.iterdir())


@pytest.fixture(scope="module", params=["4bit", "8bit"])
def done(request, wide, tmp_path_factory):
    """(load_in, folder, lines that it said) of an unbroken run."""
    folder, said = tmp_path_factory.mktemp("base") / "out", []
    start(wide, folder, model={"load_in": request.param}, say=said.append)
    return request.param, folder, said


def test_it_learns_cuts_certifies_and_reloads(done):
    load_in, folder, said = done
    summary = read(folder, "summary.json")
    bits = {"4bit": "4-bit NormalFloat", "8bit": "8-bit integers"}[load_in]
    assert any(line.startswith(f"decoder linears are held as {bits}") for line in said)
    assert summary["certificate"]["base"].startswith(bits) and bits in (folder / "report.html").read_text()
    assert summary["certificate"]["masked_vs_cut"] < 1e-5
    assert summary["perplexity"]["final"] < 0.8 * summary["perplexity"]["original"]
    assert summary["megabytes"]["final"] < summary["megabytes"]["original"]
    model = read_model(folder / "model", dtype="auto")
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    base = read_model(folder / "base", dtype="auto")
    assert {type(p) for p in base.parameters()} == {torch.nn.Parameter}
    losses = [json.loads(line)["loss"] for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("done", ["4bit", pytest.param("8bit", marks=pytest.mark.slow)], indirect=True)
def test_a_stopped_run_resumes_to_the_same_bytes(done, wide, tmp_path):
    load_in, folder, _ = done
    with stopping_at(ATPTrainer, "export"):
        start(wide, tmp_path / "out", model={"load_in": load_in})
    start(wide, tmp_path / "out", model={"load_in": load_in}, resume=True)
    assert results(tmp_path / "out") == results(folder)
