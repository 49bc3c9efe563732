"""After the cut nothing of the removed structures is left in memory, and the clock tells the truth."""

import gc
import shutil
import weakref
from pathlib import Path

import pytest
import torch
from rich.console import Console
from rich.progress import Progress, TextColumn
from tiny_inputs import tiny_config
from tiny_run import CUT, SEARCH, TOTAL, make, records

from atp.training import loop as loops
from atp.training import metrics
from atp.training.callbacks import Callback, ProgressBar
from atp.training.flat import BLOCK
from atp.training.trainer import ATPTrainer


class InTune(Callback):
    """Calls a function at the begin of the first tune step."""

    def __init__(self, look):
        self.look = look

    def on_phase(self, loop):
        if loop.phase == "tune":
            self.look(loop.model)


@pytest.fixture
def no_collector():
    gc.disable()
    yield
    gc.enable()


@pytest.mark.parametrize("space", ["head_dim", "disp"])
def test_weights_and_moments_of_removed_structures_are_gone(tmp_path, no_collector, space):
    seen = {}

    def look(model):
        seen["alive"] = [name for name, ref in uncut.items() if ref() is not None]
        seen["state"] = {p: state for p, state in trainer.adamw.state.items()}
        seen["trained"] = [p for p in model.parameters() if p.requires_grad]

    trainer = make(tmp_path, callbacks=[InTune(look)], decisions={"space": space})
    uncut = {name: weakref.ref(p) for name, p in trainer.model.named_parameters()
             if "_proj" in name and ("base_layer" in name or "lora_" in name)}  # fmt: skip
    sizes = {name: ref().numel() for name, ref in uncut.items()}
    trainer.train()  # without Python's own collector: memory must fall at the cut, not some time after
    untouched = {name for name, p in trainer.model.named_parameters() if p.numel() == sizes.get(name)}
    assert set(seen["alive"]) <= untouched, "every weight that was cut exists in its cut form alone"
    (flat,) = seen["state"]
    assert set(trainer.trained.parameters.values()) == set(seen["trained"])
    assert sum(p.numel() for p in seen["trained"]) <= flat.numel() <= sum(p.numel() + BLOCK for p in seen["trained"])
    assert seen["state"][flat]["exp_avg"].shape == seen["state"][flat]["exp_avg_sq"].shape == flat.shape
    after = sum(p.numel() for n, p in trainer.model.named_parameters() if n in sizes)
    assert after < sum(sizes.values()) and untouched != set(sizes)


class Mapped(Callback):
    """Whether the file of the weights lies in memory, at the begin of each phase."""

    def __init__(self, path):
        self.path, self.seen = path, {}

    def on_phase(self, loop):
        gc.collect()
        self.seen[loop.phase] = str(self.path) in Path("/proc/self/maps").read_text()


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="only Linux tells which files lie in memory")
@pytest.mark.parametrize("stopped", [False, True])
def test_the_file_of_the_uncut_weights_leaves_memory(tmp_path, stopped):
    """Embedding and norms, which stay as they are, would keep all of it there."""
    config = tiny_config(tmp_path)
    config.output_dir = str(tmp_path / "run")
    mapped = Mapped(tmp_path / "model.safetensors")
    trainer = ATPTrainer.from_config(config, callbacks=[mapped])
    trainer.train()
    if stopped:
        checkpoints = tmp_path / "run" / "checkpoints"
        newest = max(checkpoints.glob("checkpoint-*"))
        shutil.rmtree(newest)
        (checkpoints / "LATEST").unlink()
        del trainer
        mapped.seen = {"search": True}
        trainer = ATPTrainer.from_config(config, callbacks=[mapped])
        trainer.train(resume=True)
    assert mapped.seen["search"] and not mapped.seen["tune"]


class Watch(Callback):
    """A stopwatch that half a second passes on in each step, and seven in each log and checkpoint."""

    def __init__(self):
        self.now = 0.0

    def perf_counter(self):
        return self.now

    def on_step(self, loop, record):
        self.now += 7.0

    def on_checkpoint(self, loop, folder):
        self.now += 7.0


@pytest.mark.parametrize("packing", ["joined", "padded"])
def test_bar_and_log_agree_on_tokens_a_second(tmp_path, monkeypatch, packing):
    """Within 2 %: the bar's text, the log's tokens over its seconds, and the tokens of the batches over a stopwatch."""
    watch = Watch()
    for module in (loops, metrics):
        monkeypatch.setattr(module, "time", watch)
    trainer = make(tmp_path, callbacks=[watch], data={"packing": packing})
    console = Console(file=(tmp_path / "bar.txt").open("w"), force_terminal=False)
    shown, tokens = [], []

    class Bar(ProgressBar):
        def on_step(self, loop, record):
            super().on_step(loop, record)
            note = self.progress.tasks[0].fields["note"]
            shown.append(float(note.split()[-2].replace(",", "")))
            assert float(note.split()[1]) == pytest.approx(record["loss"], abs=6e-4)

    original = trainer.loss

    def watched(inputs, count):
        watch.now += 0.5
        tokens.append(int((inputs["labels"] != -100).sum()) if packing == "joined" else inputs["tokens"])
        return original(inputs, count)

    trainer.loss = watched
    with Progress(TextColumn("{task.fields[note]}"), console=console) as progress:
        trainer.callbacks.append(Bar(progress, trainer.phases.total))
        trainer.train()
    logged = records(tmp_path)
    assert len(logged) == len(shown) == len(tokens) == TOTAL
    if packing == "joined":
        assert tokens == [2 * 16] * TOTAL
    assert sum(tokens) == sum(trainer.clock.tokens.values())
    for record, rate in zip(logged, shown, strict=True):
        assert rate == pytest.approx(record["phase_tokens"] / record["phase_seconds"], rel=0.02)
    for first, last in ((0, SEARCH), (SEARCH, CUT), (CUT, TOTAL)):
        stopwatch = sum(tokens[first:last]) / (0.5 * (last - first))
        assert shown[last - 1] == pytest.approx(stopwatch, rel=0.02)
    assert torch.tensor(shown).min() > 0
