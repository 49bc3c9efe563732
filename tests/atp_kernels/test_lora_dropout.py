"""The adapter's dropout by seed as an operation of its own: the definition, its gradient, compilers and errors."""

import pytest
import torch
from torch.testing import assert_close

from atp_kernels import extension, kept_lora_linear, lora_dropout, masked_lora_linear
from atp_kernels.dropout import definition
from atp_kernels.kept.slices import KeptSlice

BACKENDS = ["auto", "reference", *(["native"] if extension.AVAILABLE else [])]
P, SEED = 0.3, 12345


def matrix(*shape, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype).requires_grad_()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_values_and_gradient_are_those_of_the_definition(backend, dtype):
    x = matrix(3, 7, 30, dtype=dtype)
    y = lora_dropout(x, P, SEED, backend=backend)
    keep = definition.dropped(torch.ones(21, 30), definition.Dropout(P, SEED)).view(3, 7, 30)
    assert_close(y, definition.dropped(x.detach().view(21, 30), definition.Dropout(P, SEED)).view(3, 7, 30))
    (grad,) = torch.autograd.grad(y, x, torch.ones_like(y))
    assert_close(grad, keep.to(dtype))
    assert 0.5 < (y != 0).float().mean() < 0.9


def test_gradcheck_and_second_order():
    x = torch.randn(4, 9, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: lora_dropout(x, P, SEED), x)
    assert torch.autograd.gradgradcheck(lambda x: lora_dropout(x, P, SEED), x)


def test_nothing_of_x_is_saved():
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: saved.append(tensor) or tensor, lambda tensor: tensor):
        lora_dropout(matrix(8, 16), P, SEED).sum().backward()
    assert not saved


def test_is_what_the_masked_linear_drops():
    x, weight, lora_a, lora_b = matrix(9, 24), matrix(16, 24).detach(), matrix(4, 24), matrix(16, 4)
    expected = masked_lora_linear(x, weight, lora_a, lora_b, scaling=2.0, dropout=P, seed=SEED)
    dropped = lora_dropout(x, P, SEED)
    assert_close(masked_lora_linear(x, weight, lora_a, lora_b, scaling=2.0, lora_input=dropped), expected)
    assert_close(kept_lora_linear(x, KeptSlice(weight), lora_a, lora_b, scaling=2.0, lora_input=dropped), expected)


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_whole_and_no_more_for_new_seeds(dynamic):
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(lora_dropout, fullgraph=True, dynamic=dynamic, backend=counter)
    x, frames = matrix(5, 12), []
    for seed in (1, 2, 3, 4):
        y = compiled(x, P, torch.tensor(seed))
        assert torch.equal(y, lora_dropout(x, P, seed))
        (grad,) = torch.autograd.grad(y.sum(), x)
        assert torch.equal(grad, lora_dropout(torch.ones_like(x), P, seed))
        frames.append(counter.frame_count)
    assert frames[1:] == frames[1:2] * 3


def test_no_dropout_is_x_itself():
    x = matrix(2, 3)
    assert lora_dropout(x, 0.0, SEED) is x


@pytest.mark.parametrize(
    ("x", "p", "seed", "message"),
    [
        (torch.ones(2, 3), 1.0, SEED, "dropout is 1.0: give a probability"),
        (torch.ones(2, 3), P, None, "dropout needs a seed"),
        (torch.ones(2, 3), P, torch.ones(()), "seed is a torch.float32 tensor"),
        (torch.ones(2, 3, dtype=torch.int64), P, SEED, "x is torch.int64 of shape .2, 3.: give a floating tensor"),
    ],
)
def test_bad_input_is_one_sentence(x, p, seed, message):
    with pytest.raises(ValueError, match=message):
        lora_dropout(x, p, seed)
