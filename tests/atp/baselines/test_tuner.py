"""Tuning of what a baseline leaves, and `disp_llm` as `atp compare` runs it in its own space."""

import json
import signal

import pytest
import torch
from small_llama import config, model, windows
from tiny_callbacks import StopAt
from transformers import AutoModelForCausalLM

from atp.baselines.methods import BASELINES
from atp.baselines.tuner import LoraTuner
from atp.data import PackedDataset
from atp.ground.errors import InputError, Interrupted
from atp.lora.layer import add_lora
from atp.spaces.space import MaskSpace
from atp.studies.compare.arms import Arm
from atp.studies.compare.baseline_run import BaselineRun
from atp.studies.compare.members import Members
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


def test_a_whole_run_in_its_own_space(config, tmp_path):
    values = config.model_dump(mode="json") | {"output_dir": str(tmp_path), "export": {"keep_adapter": True}}
    assert values["decisions"]["space"] == "kv_group"
    run = BaselineRun("disp_llm", type(config).parse(values), resume=False, command="atp", say=lambda text: None)
    summary = run.execute()
    decisions = json.loads((tmp_path / "decisions.json").read_text())
    assert decisions["space"] == "disp" and decisions["sizes"]["attention_inputs"] == 32
    assert summary["certificate"]["cut_vs_reloaded"] < 1e-5 and summary["certificate"]["merge_error"] <= 1.0
    for part in ("model", "base"):
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path / part, dtype=torch.float32)
        shapes = [layer.self_attn.q_proj.in_features for layer in loaded.model.layers]
        assert shapes == [len(layer["attention_inputs"]) for layer in decisions["layers"]]
    assert sum(shapes) < 2 * 32


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("training.search=0", "disp_llm learns its masks in training.search steps, which are 0"),
        ("decisions.uniform=true", "disp_llm cuts in space disp, without equal layers: leave out decisions.uniform"),
    ],
)
def test_what_it_cannot_do_is_refused_before_any_run(config, tmp_path, override, sentence):
    with pytest.raises(InputError, match=sentence):
        Members(config, tmp_path, command="").check([Arm("static"), Arm("disp_llm", (override,))], [0])
