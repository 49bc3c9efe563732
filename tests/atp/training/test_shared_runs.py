"""Two and four processes end with what one does: whole and in shards, interrupted, and resumed in another number."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny_run import CUT, make, windows
from transformers import AutoModelForCausalLM

from atp.ground.errors import InputError
from atp.training import checkpoint as checkpoints

TOLERANCE = 1e-5  # of weights and losses: only the order differs in which processes and one process add
SAME = {
    "running-sharded": "running-one",
    "untied-sharded": "untied-one",
    "embeddings-two": "embeddings-one",
    "full-two": "full-one",
    "parts-whole": "learned-one",
    "parts-fsdp": "learned-one",
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    root = tmp_path_factory.mktemp("runs")
    script = Path(__file__).with_name("shared_runs.py")
    done = subprocess.run(
        [sys.executable, str(script), str(root)], capture_output=True, text=True, timeout=900,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return root


def weights(folder):
    return {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}


@pytest.mark.slow
@pytest.mark.parametrize(("several", "one"), SAME.items())
def test_several_processes_end_with_the_decisions_losses_and_model_of_one(runs, several, one):
    found, expected = (load_file(runs / name / "decisions.safetensors")["mask"] for name in (several, one))
    assert found.equal(expected) and 0 < found.sum() < found.numel()
    found, expected = (weights(runs / name / "model") for name in (several, one))
    assert found.keys() == expected.keys()
    for name, weight in expected.items():
        torch.testing.assert_close(found[name], weight, rtol=TOLERANCE, atol=TOLERANCE)
    found, expected = ([json.loads(x) for x in (runs / name / "metrics.jsonl").open()] for name in (several, one))
    for key in ("step", "loss", "decision_loss", "keep", "lasso"):
        pairs = zip(found, expected, strict=True)
        assert all(abs(a.get(key, 0) - b.get(key, 0)) <= TOLERANCE * (1 + abs(b.get(key, 0))) for a, b in pairs), key


@pytest.mark.slow
@pytest.mark.parametrize("name", ["running-sharded", "untied-sharded", "parts-fsdp"])
def test_a_sharded_run_holds_its_certificate_and_any_tool_loads_its_model(runs, name):
    certificate = json.loads((runs / name / "certificate.json").read_text())
    assert certificate["removed_lora_norm"] == 0.0 and certificate["merge_error"] <= 1.0
    assert max(certificate["masked_vs_cut"], certificate["cut_vs_reloaded"]) < 1e-5
    model, other = (AutoModelForCausalLM.from_pretrained(runs / run / "model") for run in (name, SAME[name]))
    tokens = windows(3, seed=9).input_ids
    with torch.no_grad():
        torch.testing.assert_close(model(tokens).logits, other(tokens).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_refitted_weights_are_checkpointed_in_one_file_per_process(runs):
    """Those of the last part that had shards, which four processes wrote while tuning."""
    folder = runs / "parts-fsdp" / "checkpoints" / f"checkpoint-{CUT + 1:08d}"
    shards = sorted(folder.glob("shard-*"))
    assert [path.name for path in shards] == [f"shard-{rank:05d}-of-00004.safetensors" for rank in range(4)]
    state = checkpoints.load(folder)
    names = state.files.names()
    assert names and not state.part("refit")
    for name in names:
        rows = [load_file(path)[name] for path in shards]
        assert state.rows(name, slice(0, None)).equal(torch.cat(rows))
        assert state.rows(name, slice(3, 11)).equal(torch.cat(rows)[3:11])
    shards[2].write_bytes(shards[2].read_bytes()[:-1] + b"x")
    with pytest.raises(InputError, match=r"damaged \(shard-00002-of-00004.safetensors does not match its checksum\)"):
        checkpoints.load(folder)


def test_a_step_that_processes_cannot_share_is_refused(tmp_path, monkeypatch):
    trainer = make(tmp_path, training={"batch_size": 1, "gradient_accumulation": 4})
    state = trainer.checkpoint()
    monkeypatch.setattr("atp.training.loop.processes.count", lambda: 3)
    with pytest.raises(InputError, match="reads 4 batches, which 3 processes cannot share equally: resume it in a"):
        trainer.refuse_other_run(state)
