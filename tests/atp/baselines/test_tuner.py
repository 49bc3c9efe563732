"""Tuning of what a baseline leaves: the adapter alone learns, on ATP's samples, and a broken run ends the same."""

import json
import signal

import pytest
import torch
from small_llama import config, model, windows
from tiny_callbacks import StopAt

from atp.baselines.methods import BASELINES
from atp.baselines.tuner import LoraTuner
from atp.data import PackedDataset
from atp.ground.errors import InputError, Interrupted
from atp.lora.layer import add_lora
from atp.spaces.space import MaskSpace
from atp.training import checkpoint as checkpoints
from atp.training.trainer import ATPTrainer

STEPS = 8


def make(folder, method="random", callbacks=(), data=None, **training):
    settings = config(folder, training={"save_every": 1, "keep_checkpoints": 20} | training)
    llama = model(dtype=torch.float32)
    space = MaskSpace.from_config(llama.config)
    if baseline := BASELINES[method]:
        llama = baseline.apply(llama, baseline.choose(llama, windows(), settings), windows(), settings)
    wrapped = add_lora(llama, space, r=4, alpha=4.0, dropout=0.1, seed=settings.seed)
    return LoraTuner(settings, wrapped, data or windows(20, seed=2), folder, callbacks=callbacks)


def trained(tuner):
    return {n: p.detach().clone() for n, p in tuner.model.named_parameters() if p.requires_grad}


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    tuner = make(tmp_path_factory.mktemp("unbroken"))
    tuner.train()
    return trained(tuner)


@pytest.mark.parametrize("method", ["random", "slicegpt", "dense_lora"])
def test_only_the_adapter_learns_and_the_loss_falls(tmp_path, method):
    window = windows(1, seed=2).input_ids.expand(20, -1)
    tuner = make(tmp_path, method, data=PackedDataset(window, window), lr=1e-2)
    before = {n: p.detach().clone() for n, p in tuner.model.named_parameters()}
    tuner.train()
    changed = {n for n, p in tuner.model.named_parameters() if not torch.equal(p, before[n])}
    assert changed == {n for n in before if ".lora_" in n}
    losses = [json.loads(line)["loss"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert len(losses) == STEPS and losses[-1] < losses[0]


def test_reads_the_samples_that_atp_reads(tmp_path):
    tuner = make(tmp_path / "tuner")
    atp = ATPTrainer(config(tmp_path / "atp"), model(dtype=torch.float32), windows(20, seed=2), windows())
    for ours, theirs in zip(tuner.batches_from(0), atp.batches_from(0), strict=True):
        assert len(ours) == len(theirs) == 1 and torch.equal(ours[0]["input_ids"], theirs[0]["input_ids"])
    tuner.train()
    assert tuner.clock.tokens == {"tune": STEPS * 2 * 16}


def test_a_signal_writes_a_checkpoint_and_resume_ends_the_same(unbroken, tmp_path):
    with pytest.raises(Interrupted):
        make(tmp_path, callbacks=[StopAt(3, signal.SIGTERM)]).train()
    assert checkpoints.load(checkpoints.newest(tmp_path / "checkpoints")).step == 3
    with pytest.raises(InputError, match=r"training\.lr"):
        make(tmp_path, lr=0.5).train(resume=True)
    for _ in range(2):  # and again when it has ended
        resumed = make(tmp_path)
        resumed.train(resume=True)
        assert all(torch.equal(tensor, unbroken[name]) for name, tensor in trained(resumed).items())
    steps = [json.loads(line)["step"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert steps == list(range(1, STEPS + 1))
