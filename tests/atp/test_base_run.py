"""A whole run over a base in 4 or 8 bits: it learns, cuts, certifies and reloads, and is taken up where it stopped."""

import json

import pytest
import torch
from tiny_command import read, results, start, stopping_at
from tiny_inputs import tiny_config

from atp.models.load import read_model
from atp.training.trainer import ATPTrainer


@pytest.fixture(scope="module")
def wide(tmp_path_factory):
    return tiny_config(tmp_path_factory.mktemp("inputs"), hidden_size=64, intermediate_size=128)


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
