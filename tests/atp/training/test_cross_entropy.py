"""Chunked cross-entropy against float64, against plain PyTorch, and against its promise on memory."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from atp.training import cross_entropy
from atp.training.cross_entropy import linear_cross_entropy

TOKENS, HIDDEN, VOCAB = 23, 12, 41
ROWS = cross_entropy._rows  # before the fixture below replaces it


@pytest.fixture(params=[1, 5, 64], ids="{} rows".format, autouse=True)
def chunk_rows(request, monkeypatch):
    """Chunks of one token, of a number that does not divide the tokens, and of all."""
    monkeypatch.setattr(cross_entropy, "_rows", lambda hidden, *_: max(min(request.param, len(hidden)), 1))


def inputs(dtype=torch.float64, tokens=TOKENS, scale=1.0, seed=0):
    generator = torch.Generator().manual_seed(seed)
    hidden = scale * torch.randn(tokens, HIDDEN, generator=generator, dtype=torch.float64)
    weight = torch.randn(VOCAB, HIDDEN, generator=generator, dtype=torch.float64)
    targets = torch.randint(VOCAB, (tokens,), generator=generator)
    return hidden.to(dtype).requires_grad_(), weight.to(dtype).requires_grad_(), targets


def plain(hidden, weight, targets):
    logits = F.linear(hidden, weight)
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return F.cross_entropy(wide, targets, reduction="sum")


def results(loss_of, hidden, weight, targets, scale=1.0):
    hidden, weight = (t.detach().clone().requires_grad_() for t in (hidden, weight))
    loss = loss_of(hidden, weight, targets)
    return loss.detach(), *torch.autograd.grad(scale * loss, (hidden, weight))


@settings(max_examples=15, derandomize=True, deadline=None)
@given(st.integers(0, 40), st.integers(0, 5), st.sampled_from([0.0, 1.0, 300.0]), st.booleans())
def test_equals_the_plain_form_in_float64(tokens, seed, scale, strided):
    *matrices, targets = inputs(tokens=tokens, seed=seed, scale=scale)
    case = *((matrix.detach().T.contiguous().T if strided else matrix) for matrix in matrices), targets
    for ours, theirs in zip(results(linear_cross_entropy, *case, 0.3), results(plain, *case, 0.3), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


def capped(hidden, weight, targets):
    """The loss as Gemma 2 has it."""
    return F.cross_entropy(30.0 * torch.tanh(F.linear(hidden, weight) / 30.0), targets, reduction="sum")


@pytest.mark.parametrize("scale", [1.0, 30.0])
def test_capped_logits_equal_the_plain_form_in_float64(scale):
    case = inputs(scale=scale)
    ours = results(lambda *given: linear_cross_entropy(*given, cap=30.0), *case, 0.3)
    for found, truth in zip(ours, results(capped, *case, 0.3), strict=True):
        torch.testing.assert_close(found, truth, rtol=1e-12, atol=1e-12)


def under_autocast(hidden, weight, targets):
    with torch.autocast("cpu", torch.bfloat16):
        loss = linear_cross_entropy(hidden, weight, targets)
    return loss.detach(), *torch.autograd.grad(loss, hidden)


def test_a_frozen_head_is_cast_once_while_it_is_held(monkeypatch):
    hidden, weight, targets = inputs(torch.float32)
    weight = torch.nn.Parameter(weight.detach(), requires_grad=False)
    expected = under_autocast(hidden, weight, targets)
    with cross_entropy.held_heads():
        assert all(map(torch.equal, under_autocast(hidden, weight, targets), expected))
        (held,) = cross_entropy._casts.values()
        assert held[1].dtype == torch.bfloat16
        assert all(map(torch.equal, under_autocast(hidden, weight, targets), expected))
        assert cross_entropy._casts[weight] is held
        weight.mul_(1.5)
        changed = under_autocast(hidden, weight, targets)
        assert not torch.equal(changed[0], expected[0]), "cast again"
        trained = torch.nn.Parameter(weight.clone())
        under_autocast(hidden, trained, targets)
        under_autocast(hidden, weight.clone(), targets)
        linear_cross_entropy(hidden, weight, targets)
        assert list(cross_entropy._casts) == [weight], "neither a trained one nor a gathered one is held"
    assert cross_entropy._casts is None
    assert all(map(torch.equal, under_autocast(hidden, weight, targets), changed))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("autocast", [False, True])
def test_error_is_at_most_twice_that_of_the_plain_form(dtype, autocast):
    hidden, weight, targets = inputs(dtype)
    exact = results(plain, hidden.double(), weight.double(), targets)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        ours, theirs = (results(f, hidden, weight, targets) for f in (linear_cross_entropy, plain))
    for mine, other, truth in zip(ours, theirs, exact, strict=True):
        assert mine.dtype == other.dtype
        error, allowed = (float((value.double() - truth).norm()) for value in (mine, other))
        assert error <= 2 * allowed + 1e-6 * float(truth.norm())


@pytest.mark.parametrize("frozen", [0, 1])
def test_what_is_frozen_gets_no_gradient(frozen):
    *both, targets = inputs()
    expected = results(linear_cross_entropy, *both, targets)[2 - frozen]
    both[frozen].requires_grad_(False)
    linear_cross_entropy(*both, targets).backward()
    assert both[frozen].grad is None and torch.equal(both[1 - frozen].grad, expected)


def test_backward_twice_and_repeats_are_bitwise_equal():
    hidden, weight, targets = inputs(torch.float32)
    loss = linear_cross_entropy(hidden, weight, targets)
    first = torch.autograd.grad(loss, (hidden, weight), retain_graph=True)
    again = torch.autograd.grad(loss, (hidden, weight))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    for _ in range(3):
        repeat = results(linear_cross_entropy, hidden, weight, targets)
        assert all(torch.equal(a, b) for a, b in zip(repeat, (loss.detach(), *first), strict=True))


@pytest.mark.parametrize("scale", [1.0, torch.ones((), dtype=torch.float64, requires_grad=True)], ids=str)
def test_second_derivatives_are_refused(scale):
    """Also where the loss is the last of all, so that what its gradient is multiplied by is a constant."""
    hidden, weight, targets = inputs(tokens=4)
    loss = scale * linear_cross_entropy(hidden, weight, targets)
    (gradient,) = torch.autograd.grad(loss, hidden, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.square().sum().backward()


class LargestTensor(TorchDispatchMode):
    """Elements of the largest storage that any operation returned."""

    def __init__(self):
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                self.numel = max(self.numel, tensor.untyped_storage().nbytes() // tensor.itemsize)
        return result


@pytest.mark.parametrize("autocast", [False, True])
def test_no_tensor_holds_the_logits_of_the_batch(monkeypatch, autocast):
    monkeypatch.setattr(cross_entropy, "_rows", lambda *_: 4)
    hidden, weight = torch.randn(64, 8, requires_grad=True), torch.randn(512, 8)
    targets = torch.arange(64)
    with LargestTensor() as largest, torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        linear_cross_entropy(hidden, weight, targets).backward()
    assert largest.numel <= weight.numel() < 64 * 512 // 4


def test_chunks_fill_their_memory_and_no_more():
    def rows(tokens, vocab):
        return ROWS(torch.empty(tokens, 1, device="meta"), torch.empty(vocab, 1, device="meta"), 2)

    assert rows(10_000, 49_152) * 49_152 * 2 <= 64 * 2**20 < (rows(10_000, 49_152) + 1) * 49_152 * 2
    assert rows(3, 49_152) == 3 and rows(3, 10**9) == 1


@pytest.mark.parametrize(
    ("vocab", "itemsize", "rows"), [(128_256, 2, 512), (151_936, 2, 384), (128_256, 4, 256), (2**22, 2, 16)]
)
def test_chunks_on_cuda_are_whole_tiles(vocab, itemsize, rows):
    """523 rows would take as long as 640. What is smaller than a tile stays as it is."""

    class OnCuda(list):
        is_cuda = True

    assert ROWS(OnCuda(range(10_000)), range(vocab), itemsize) == rows
    assert ROWS(OnCuda(range(7)), range(vocab), itemsize) == 7
