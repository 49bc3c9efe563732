"""`training.offload`: the same run, with activations elsewhere between forward and backward."""

import errno
import io
import tempfile

import pytest
import torch
from tiny_run import CUT, TOTAL, assert_same_end, make, resumed

from atp.ground.ending import ending
from atp.training import offload
from atp.training.offload import Offload

pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def every_tensor(monkeypatch):
    monkeypatch.setattr(offload, "SMALLEST", 1)


@pytest.fixture
def moved(monkeypatch):
    """The shapes of all tensors that are put aside."""
    shapes = []

    def noted(name):
        original = getattr(offload, name)

        def call(tensor, *where):
            shapes.append(tuple(tensor.shape))
            return original(tensor, *where)

        monkeypatch.setattr(offload, name, call)

    for name in ("_to_file", "_to_host"):
        noted(name)
    return shapes


CASES = {
    "learned": {},
    "running": {"decisions": {"source": "running", "space": "kv_group"}, "training": {"open": 2}},
    "checkpointing": {"training": {"gradient_checkpointing": True, "gradient_accumulation": 2}},
    "separate": {"data": {"packing": "separate"}, "training": {"precision": "bfloat16"}},
    "l0": {"training": {"regularizer": "l0", "precision": "bfloat16"}},
    "quantized": {"model": {"load_in": "8bit"}},
}


@pytest.mark.parametrize("case", CASES)
def test_gives_the_same_run(tmp_path, moved, case):
    overrides = CASES[case]
    plain = make(tmp_path / "plain", **overrides)
    plain.train()
    assert not moved
    other = make(tmp_path / "other", **overrides | {"training": overrides.get("training", {}) | {"offload": True}})
    other.train()
    assert moved
    assert_same_end(other, plain)
    assert {path.name for path in (tmp_path / "other").iterdir()} == {"checkpoints", "metrics.jsonl"}


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_weights_stay(tmp_path, monkeypatch, moved, precision):
    """From the second pass of a phase on, their narrow copies too."""
    sizes = {"hidden_size": 40, "intermediate_size": 56}  # of which no batch has as many rows, and no adapter as many
    trainer = make(tmp_path, sizes=sizes, lora={"r": 3}, training={"offload": True, "precision": precision})
    loss, passes = trainer.loss, []

    def watched(*arguments):
        moved.clear()
        result = loss(*arguments)
        weights = {tuple(p.shape) for n, p in trainer.model.named_parameters() if p.ndim == 2 and "lora_" not in n}
        passes.append((trainer.phase, weights & set(moved)))
        assert (2, 16, 40) in moved, "the state that a layer reads"
        return result

    monkeypatch.setattr(trainer, "loss", watched)
    trainer.train()
    assert len(passes) == TOTAL
    seen = set()
    for phase, weights in passes:
        if phase != "search":  # where each step has a new mask, and so new slices
            assert not weights or phase not in seen, phase
        seen.add(phase)


@pytest.mark.parametrize("step", [1, CUT, TOTAL - 1])
def test_a_run_resumes_without_it(tmp_path, step):
    whole = make(tmp_path / "whole")
    whole.train()
    assert_same_end(resumed(tmp_path / "whole", step, tmp_path / "other", training={"offload": True}), whole)


def test_a_full_disk_ends_with_one_sentence(tmp_path, monkeypatch):
    class Full(io.BytesIO):
        def write(self, data):
            raise OSError(errno.ENOSPC, "No space left on device")

    trainer = make(tmp_path, training={"offload": True})
    monkeypatch.setattr(tempfile, "TemporaryFile", lambda **options: Full())
    with pytest.raises(OSError) as caught:
        trainer.train()
    assert ending(caught.value)[0].startswith("the disk is full")


# One pass


class Square(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.detach().square()

    @staticmethod
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        return 2 * x * grad


MODEL = torch.nn.Identity()


def leaf(*shape, dtype=torch.float64):
    return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(0)).requires_grad_()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("view", ["whole", "transposed", "strided", "expanded", "empty"])
def test_every_dtype_and_stride_comes_back(tmp_path, dtype, view):
    views = {
        "whole": lambda x: x,
        "transposed": lambda x: x.T,
        "strided": lambda x: x[1::2, ::3],
        "expanded": lambda x: x[:1].expand(5, 7),
        "empty": lambda x: x[:0],
    }
    x = leaf(6, 7, dtype=dtype)
    expected = torch.autograd.grad(Square.apply(views[view](x).clone()).sum(), x)[0]
    offloaded = Offload(tmp_path)
    with offloaded.saving(MODEL):
        y = Square.apply(views[view](x) * 1)
    assert (offloaded.bytes > 0) == (view != "empty")
    assert torch.equal(torch.autograd.grad(y.sum(), x)[0], expected)


def twice(x):
    y = x * 1
    return Square.apply(y) + Square.apply(y)


def changed_in_place(x):
    y = x * 1
    return Square.apply(y) + Square.apply(y.add_(1))


def memory_used_again(x):
    """The second product may lie where the first one did."""
    return sum(Square.apply(x * factor) for factor in range(8))


@pytest.mark.parametrize(
    ("work", "slope", "smallest", "kept"),
    [
        (twice, lambda x: 4 * x, 1, 1),
        (changed_in_place, lambda x: 2 * x + 2 * (x + 1), 1, 2),
        (memory_used_again, lambda x: sum(2 * factor * factor * x for factor in range(8)), 1, 8),
        (lambda x: Square.apply(x * 1), lambda x: 2 * x, 513, 0),
    ],
    ids=["twice", "changed in place", "memory used again", "small"],
)
def test_each_tensor_is_kept_once_as_it_was(tmp_path, monkeypatch, work, slope, smallest, kept):
    monkeypatch.setattr(offload, "SMALLEST", smallest)
    offloaded, x = Offload(tmp_path), leaf(8, 8)
    with offloaded.saving(MODEL):
        y = work(x)
    assert offloaded.bytes == kept * x.nbytes
    torch.testing.assert_close(torch.autograd.grad(y.sum(), x)[0], slope(x.detach()))


def test_passes_whose_backward_comes_later_do_not_mix(tmp_path):
    offloaded, x = Offload(tmp_path), leaf(8, 8)
    with offloaded.saving(MODEL):
        first = Square.apply(x * 1)
    with offloaded.saving(MODEL):
        second = Square.apply(x * 3)
    assert torch.equal(torch.autograd.grad(first.sum(), x)[0], 2 * x)
    torch.testing.assert_close(torch.autograd.grad(second.sum(), x)[0], 18 * x)


def test_a_system_that_reads_and_writes_a_little_at_a_time(tmp_path, monkeypatch):
    class Slow(io.BytesIO):
        def write(self, data):
            return super().write(data[:7])

        def readinto(self, buffer):
            return super().readinto(memoryview(buffer)[:5])

    monkeypatch.setattr(tempfile, "TemporaryFile", lambda **options: Slow())
    x = leaf(8, 8)
    with Offload(tmp_path).saving(MODEL):
        y = Square.apply(x * 1)
    assert torch.equal(torch.autograd.grad(y.sum(), x)[0], 2 * x)
