"""Steps that replay their passes end with the bytes of steps that do not: a tape of operators stands for CUDA's graphs.

Like a graph, a tape knows no Python: what a pass reads from the host is what it was at the capture.
"""

import pytest
import torch
from tiny_run import make, trained_tensors
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from atp.ground.errors import NotReached
from atp.training import cuda_graphs, loop
from atp.training.cuda_graphs import WARM_UP, GraphedDecoder

PHASES = {"open": 4, "search": 0, "settle": 0, "tune": 4, "cuda_graphs": True}


class Tape(TorchDispatchMode):
    """Records operators on the memory that they read and write; replays them there."""

    made = []

    def __init__(self):
        super().__init__()
        self.operators, self.replays = [], 0
        self.made.append(self)

    def __call__(self, passes):
        tape = Tape()
        with tape, torch.autograd.set_multithreading_enabled(False):
            passes()
        return tape.replay

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **kwargs or {})
        self.operators.append((func, args, kwargs or {}, result))
        return result

    @torch.no_grad()
    def replay(self):
        self.replays += 1
        for func, args, kwargs, result in self.operators:
            again = func(*args, **kwargs)
            written = {t.untyped_storage().data_ptr() for t in tensors((args, kwargs))}
            for before, now in zip(tensors(result), tensors(again), strict=True):
                if before.untyped_storage().data_ptr() not in written:
                    before.copy_(now)


def tensors(tree):
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


@pytest.fixture
def tape(monkeypatch):
    monkeypatch.setattr(cuda_graphs, "DEVICES", ("cpu",))
    monkeypatch.setattr(cuda_graphs, "WARM_UP", 1)
    monkeypatch.setattr(loop, "CudaGraphs", Tape)
    monkeypatch.setattr(Tape, "made", [])
    return Tape


def trained(folder, **overrides):
    overrides = {"lora": {"dropout": 0.0}, "decisions": {"source": "running", "space": "kv_group"}} | overrides
    overrides["training"] = PHASES | overrides.get("training", {})
    trainer = make(folder, **overrides)
    trainer.train()
    return trained_tensors(trainer) | {"mask": trainer.decisions.mask}


@pytest.mark.parametrize(
    "overrides",
    [
        {},
        {"training": {"precision": "bfloat16"}},
        {"data": {"packing": "separate"}, "training": {"gradient_accumulation": 2}},
        {"data": {"packing": "padded"}, "training": {"precision": "bfloat16", "open": 14, "tune": 14}},
    ],
    ids=["float32", "bfloat16", "separate", "padded"],
)
def test_the_same_bytes(tmp_path, tape, overrides):
    found = trained(tmp_path / "graphs", **overrides)
    made = list(tape.made)
    plain = dict(overrides) | {"training": overrides.get("training", {}) | {"cuda_graphs": False}}
    expected = trained(tmp_path / "plain", **plain)
    assert found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in found)
    captured = [each for each in made if each.operators]
    assert len(captured) >= 4 and all(each.replays for each in captured), "forward and backward of both phases"


class Scaled:
    """A decoder of one weight."""

    def __init__(self):
        self.weight = torch.nn.Parameter(torch.ones(()))
        self.weight.grad = torch.zeros(())

    def __call__(self, x):
        return type("Output", (), {"last_hidden_state": x * self.weight})


def test_a_shape_beyond_the_most_runs_as_it_is(monkeypatch):
    monkeypatch.setattr(cuda_graphs, "MOST", 1)
    decoder, tape = Scaled(), Tape()
    graphed = GraphedDecoder([decoder.weight], tape)
    for size in [2] * (WARM_UP + 1) + [3] * (WARM_UP + 1) + [2]:
        graphed(decoder, {"x": torch.ones(size)}).sum().backward()
    assert len(graphed._graphs) == 1 and decoder.weight.grad == 2 * (WARM_UP + 2) + 3 * (WARM_UP + 1)


def test_a_second_batch_before_the_backward_pass_runs_as_it_is():
    decoder = Scaled()
    graphed = GraphedDecoder([decoder.weight], Tape())
    values = [torch.full((2,), float(value)) for value in range(1, WARM_UP + 3)]
    for value in values[:WARM_UP]:
        graphed(decoder, {"x": value})
    other = {"x": torch.ones(3)}
    for _ in range(WARM_UP):
        graphed(decoder, other)
    graphed(decoder, other).sum().backward()
    decoder.weight.grad.zero_()
    one, two, three = (graphed(decoder, given) for given in ({"x": values[-2]}, {"x": values[-1]}, other))
    (one.sum() + two.sum() + three.sum()).backward()
    assert decoder.weight.grad == values[-2].sum() + values[-1].sum() + 3
    assert torch.equal(graphed(decoder, {"x": values[0]}), values[0])
    with torch.no_grad():
        assert not graphed(decoder, {"x": values[1]}).requires_grad


def test_a_failed_capture_names_the_remedy(tmp_path, tape, monkeypatch):
    def fail(self, passes):
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(Tape, "__call__", fail)
    with pytest.raises(NotReached, match="not permitted when stream is capturing.*training.cuda_graphs=false"):
        trained(tmp_path)
    monkeypatch.setattr(Tape, "__call__", lambda self, passes: torch.empty(2**60))
    with pytest.raises(RuntimeError, match="memory"):
        trained(tmp_path / "memory")


def hook(trainer):
    trainer.model.get_base_model().model.layers[0].register_forward_hook(lambda *call: None)


def long(trainer):
    trainer.model.get_base_model().config.rope_parameters = {"rope_type": "longrope", "rope_theta": 1e4}


@pytest.mark.parametrize(
    ("overrides", "change", "reason"),
    [
        ({"lora": {"dropout": 0.1}}, None, "every replay would repeat what lora.dropout drew"),
        ({"training": {"gradient_checkpointing": True}}, None, "training.gradient_checkpointing works inside"),
        ({"training": {"offload": True}}, None, "training.offload works inside the passes"),
        ({"training": {"embeddings": True}}, None, "the head's gradient is not added inside the passes"),
        ({}, hook, "somebody waits for calls of base_model.model.model.layers.0"),
        ({}, long, "RoPE of type longrope reads the length of every batch"),
        ({}, lambda trainer: cuda_graphs.__dict__.update(DEVICES=("cuda",)), "it trains on cpu, not on a GPU"),
    ],
)
def test_what_is_in_the_way_is_said(tmp_path, tape, overrides, change, reason):
    training = PHASES | {"open": 1, "tune": 1} | overrides.get("training", {})
    settings = {"lora": {"dropout": 0.0}, "decisions": {"source": "running"}} | overrides | {"training": training}
    trainer = make(tmp_path, **settings)
    if change:
        change(trainer)
    said = []
    trainer.say = said.append
    with trainer._graphed("open"):
        assert trainer._decode is None
    assert len(said) == 1 and reason in said[0] and said[0].startswith("training.cuda_graphs: open steps run without")
