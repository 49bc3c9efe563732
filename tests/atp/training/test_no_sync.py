"""Between two log points no step reads a value back: on a GPU each such read would halt the host."""

from contextlib import nullcontext
from functools import partial

import pytest
import torch
from tiny_run import CUT, SEARCH, make
from torch.overrides import TorchFunctionMode
from torch.profiler import ProfilerActivity, profile, record_function

# What torch runs, at any depth, to bring a value or a size that depends on values to the host.
READS = {
    "aten::item", "aten::_local_scalar_dense", "aten::is_nonzero", "aten::nonzero", "aten::masked_select",
    "aten::equal", "aten::allclose", "aten::_unique2", "aten::unique_dim", "aten::repeat_interleave",
}  # fmt: skip
SLICES = "hard masks"


class Lists(TorchFunctionMode):
    """Notes conversions that are no operators."""

    def __init__(self):
        super().__init__()
        self.seen = {}

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func in (torch.Tensor.tolist, torch.Tensor.numpy):
            self.seen[func.__name__] = self.seen.get(func.__name__, 0) + 1
        return func(*args, **(kwargs or {}))


def on_the_host_by_design(event):
    """The CPU's fused AdamW looks at its step counters (CUDA's does on the device), and hard masks lie on the host."""
    while event is not None and event.name not in ("aten::_fused_adamw_", SLICES):
        event = event.cpu_parent
    return event is not None


class HostReads:
    """Counts reads inside a with block."""

    def __enter__(self):
        self.lists = Lists().__enter__()
        self.profile = profile(activities=[ProfilerActivity.CPU]).__enter__()
        return self

    def __exit__(self, *error):
        self.profile.__exit__(*error)
        self.lists.__exit__(*error)
        names = [event.name for event in self.profile.events() if not on_the_host_by_design(event)]
        self.counts = {name: names.count(name) for name in READS.intersection(names)} | self.lists.seen
        self.operators = len(names)


class Watch:
    """Counts reads from the begin to the end of chosen steps, in all that lies between loading data and logging."""

    def __init__(self, trainer, steps):
        self.steps, self.found, self.operators = steps, {}, {}
        self.run = trainer.run
        trainer.run = lambda phase, step, until: self.run(phase, partial(self.count, trainer, step), until)

    def count(self, trainer, step, batches):
        if trainer.step not in self.steps:
            return step(batches)
        with HostReads() as reads:
            step(batches)
            trainer.wrapped.zero_grad()
        self.found[trainer.step], self.operators[trainer.step] = reads.counts, reads.operators


@pytest.mark.parametrize("read", [
    lambda x: x.sum().item(), lambda x: bool(x.any()), lambda x: float(x[0]), lambda x: x.tolist(), lambda x: x[x > 1],
    lambda x: x.nonzero(), lambda x: torch.equal(x, x), lambda x: int(x.argmax()),
])  # fmt: skip
def test_the_count_sees_every_kind_of_read(read):
    with HostReads() as reads:
        read(torch.arange(3.0))
    assert sum(reads.counts.values()) > 0
    with HostReads() as reads:
        (torch.arange(3.0) > 1).float().sum()
    assert reads.counts == {}


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("budget", "dropout", "regularizer"),
    [("exact", 0.0, "lasso"), ("exact", 0.1, "lasso"), ("penalty", 0.0, "lasso"), ("exact", 0.0, "l0")],
)
def test_no_step_reads_a_value(tmp_path, monkeypatch, precision, budget, dropout, regularizer):
    """One search step (decision, new mask, LoRA) and one tune step, data loading aside: that is the host's own work.

    With dropout each of the 14 linears reads its seed, which lies on the host wherever the model is.
    """
    steps = (1, SEARCH - 1, CUT + 1)
    training = {"precision": precision, "log_every": 100, "save_every": 100, "regularizer": regularizer}
    trainer = make(tmp_path, training=training, decisions={"budget": budget}, lora={"dropout": dropout})
    watch, pruning = Watch(trainer, steps), trainer.pruning
    size = trainer.config.decisions.batch_size
    ready = {step: pruning.calibration_batch(step, size) for step in range(SEARCH)}
    original = pruning.calibration_batch
    monkeypatch.setattr(pruning, "calibration_batch", lambda i, n: ready[i] if n == size else original(i, n))
    set_masks = pruning.controller.set

    def set_marked(mask, form):
        with record_function(SLICES) if form == "hard" else nullcontext():
            set_masks(mask, form)

    monkeypatch.setattr(pruning.controller, "set", set_marked)
    trainer.train()
    seeds = {"aten::item": 14, "aten::_local_scalar_dense": 14} if dropout else {}
    assert watch.found == {step: seeds for step in steps}
    assert all(count > 200 for count in watch.operators.values())
