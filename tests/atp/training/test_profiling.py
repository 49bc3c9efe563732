"""The profile puts time where it belongs, and changes nothing."""

import gzip
import json

import pytest
import torch
from tiny_run import make, trained_tensors
from torch.profiler import ProfilerActivity, profile
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from atp.training.profiling import _BACKWARD, HEADINGS, Profiler, _mark_modules, scope, step_table

pytestmark = pytest.mark.slow


def table_of(work):
    with profile(activities=[ProfilerActivity.CPU]) as finished:
        work()
    events = finished.events()
    table = step_table(events)
    assert sum(table.values()) == pytest.approx(sum(event.self_cpu_time_total for event in events) / 1e6)
    return table


def share(table, heading):
    return table[heading] / sum(table.values())


def test_forward_and_backward_of_a_norm_go_to_norm():
    norm = torch.nn.Sequential(LlamaRMSNorm(512))
    hooks = list(_mark_modules(norm))
    x, gradient = torch.randn(4000, 512, requires_grad=True), torch.ones(4000, 512)

    def work():
        torch.autograd.grad(norm(x), [x, *norm.parameters()], gradient)

    work()
    assert share(table_of(work), "norm") > 0.8
    for hook in hooks:
        hook.remove()
    assert table_of(work)["norm"] == 0


def test_backward_of_a_scope_is_its_own():
    x, gradient = torch.randn(300, 300, requires_grad=True), torch.ones(300, 300)
    with profile(activities=[ProfilerActivity.CPU]) as finished:
        with scope("loss"):
            y = x.exp()
        y.tanh().backward(gradient)
    events = finished.events()
    (node,) = [event for event in events if event.name == _BACKWARD + "ExpBackward0"]
    (other,) = [event for event in events if event.name == _BACKWARD + "TanhBackward0"]
    forward = sum(event.self_cpu_time_total for event in events if event.name in ("atp::loss", "aten::exp"))
    table = step_table(events)
    assert table["loss"] == pytest.approx((forward + node.cpu_time_total) / 1e6)
    assert table["other"] >= other.cpu_time_total / 1e6


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_profiled_run_writes_every_phase_and_trains_the_same(tmp_path, checkpointing):
    training = {"gradient_checkpointing": checkpointing}
    plain, profiled = (make(tmp_path / name, training=training) for name in ("plain", "profiled"))
    folder = tmp_path / "profile"
    profiled.callbacks.append(Profiler(folder, profiled.phases.of, profiled.phases.total))
    for trainer in (plain, profiled):
        trainer.train()
    expected = trained_tensors(plain)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in trained_tensors(profiled).items())
    rows = json.loads((folder / "table.json").read_text())
    assert list(rows) == ["search", "settle", "tune"]
    for phase, row in rows.items():
        assert set(row) == {*HEADINGS, "wall"} and row["wall"] >= 0.5 * sum(row[heading] for heading in HEADINGS)
        assert all(row[heading] > 0 for heading in ("matmul", "attention", "norm", "loss", "optimizer", "other"))
        trace = json.loads(gzip.decompress((folder / f"{phase}.json.gz").read_bytes()))
        assert any(event.get("name") == "aten::mm" for event in trace["traceEvents"])
    assert rows["search"]["data"] > 0 and rows["search"]["masks"] > rows["tune"]["masks"]
    lines = (folder / "table.txt").read_text().splitlines()
    assert lines[0].split()[-3:] == ["search", "settle", "tune"]
    assert [line.split()[0] for line in lines[1:]] == [*HEADINGS, "operators", "wall"]


def test_spans_skip_the_first_step_of_a_phase_and_never_leave_it(tmp_path):
    phases = ["search"] * 6 + ["settle"] * 2 + ["tune"]
    spans = Profiler(tmp_path, phases.__getitem__, len(phases)).spans
    assert spans == {"search": range(1, 4), "settle": range(7, 8), "tune": range(8, 9)}
