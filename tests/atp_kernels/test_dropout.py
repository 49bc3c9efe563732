"""The adapter's dropout by seed: its random bits, in the masked linear, on its own, and with a seed on the device."""

from dataclasses import replace
from functools import partial

import numpy
import pytest
import torch
from backends_here import DEVICE, backends, on_device
from block_cases import saved_shapes
from linear_cases import SEED, Shape, operands, with_gradients
from torch.testing import assert_close

from atp_kernels import checks, lora_dropout, masked_lora_linear, new_seed
from atp_kernels.checks import check_dropout
from atp_kernels.dropout import aten, definition
from atp_kernels.dropout import op as dropout_op
from atp_kernels.dropout.definition import Dropout, dropped, philox
from atp_kernels.linear import op

SOFT = Shape(mask_lora=True, p=0.4)
ORDER = ("x", "weight", "lora_a", "lora_b", "bias", "lora_input", "out_mask", "in_mask")

# The known answers that come with Random123 (kat_vectors): rounds, counter, key, words.
KNOWN = """
7  00000000 00000000 00000000 00000000 00000000 00000000 5f6fb709 0d893f64 4f121f81 4f730a48
7  ffffffff ffffffff ffffffff ffffffff ffffffff ffffffff 5207ddc2 45165e59 4d8ee751 8c52f662
7  243f6a88 85a308d3 13198a2e 03707344 a4093822 299f31d0 4dfccaba 190a87f0 c47362ba b6b5242a
10 00000000 00000000 00000000 00000000 00000000 00000000 6627e8d5 e169c58d bc57ac4c 9b00dbd8
10 ffffffff ffffffff ffffffff ffffffff ffffffff ffffffff 408f276d 41c83b0e a20bc7c6 6d5451fd
10 243f6a88 85a308d3 13198a2e 03707344 a4093822 299f31d0 d16cfe09 94fdcceb 5001e420 24126ea1
""".strip().splitlines()


@pytest.mark.parametrize("line", KNOWN)
def test_philox_gives_the_published_words(line):
    rounds, *words = line.split()
    *counter, low, high = (int(word, 16) for word in words[:6])
    got = philox(tuple(torch.tensor(word) for word in counter), (low, high), int(rounds))
    assert [f"{int(word):08x}" for word in got] == words[6:]


def kept_by_numpy(rows: int, cols: int, p: float, seed: int) -> numpy.ndarray:
    """Which elements the definition keeps, in unsigned arithmetic and element by element."""
    m, k = numpy.indices((rows, cols)).astype(numpy.uint64)
    counter = [m, k // 4, 0 * m, 0 * m]
    low, high = numpy.uint64(seed % 2**64 % 2**32), numpy.uint64(seed % 2**64 // 2**32)
    word = numpy.uint64(2**32)
    for _ in range(7):
        one, two = counter[0] * numpy.uint64(0xD2511F53), counter[2] * numpy.uint64(0xCD9E8D57)
        counter = [two // word ^ counter[1] ^ low, two % word, one // word ^ counter[3] ^ high, one % word]
        low, high = (low + numpy.uint64(0x9E3779B9)) % word, (high + numpy.uint64(0xBB67AE85)) % word
    return numpy.choose((k % 4).astype(int), counter) >= numpy.uint64(int(p * 2**32))


@pytest.mark.parametrize("seed", [0, 1, 2**32, -1, SEED])
@pytest.mark.parametrize(("rows", "cols"), [(1, 1), (7, 11), (5, 64)])
def test_the_elements_kept_are_those_of_the_definition(rows, cols, seed):
    x = torch.rand(rows, cols, dtype=torch.float64) + 1
    for p in (0.1, 0.5, 0.999):
        kept = torch.from_numpy(kept_by_numpy(rows, cols, p, seed))
        assert torch.equal(dropped(x, Dropout(p, seed)), torch.where(kept, x * (1 / (1 - p)), 0))


def test_blocks_of_rows_do_not_show(monkeypatch):
    x = torch.rand(50, 13)
    whole = dropped(x, Dropout(0.3, SEED))
    monkeypatch.setattr(aten, "CACHED_ELEMENTS", 40)
    assert torch.equal(aten.dropped(x, Dropout(0.3, SEED)), whole)


# In the masked linear


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_forward_equals_a_dropped_input_that_is_given_in_every_bit(dtype):
    tensors = operands(SOFT, dtype)
    own = dropped(tensors["x"], SOFT.drawn)
    given = masked_lora_linear(**tensors, **replace(SOFT, p=0.0).options, lora_input=own)
    assert torch.equal(masked_lora_linear(**tensors, **SOFT.options), given)


def operator_call(shape, tensors, seed):
    arguments = [tensors.get(name) for name in ORDER]
    arguments += [shape.scaling, shape.mask_lora, shape.out_mask == "soft", shape.p, seed, "reference"]
    return op.masked_lora_linear_op(*arguments)


@pytest.mark.parametrize("through", ["eager", "operator"])
@pytest.mark.parametrize("mask_lora", [False, True])
def test_neither_the_mask_nor_the_dropped_input_is_stored(through, mask_lora):
    """What is kept for backward is the caller's operands, S [M, r], and a seed: nothing new as large as x."""
    shape = Shape(out_mask="hard", in_mask="hard", mask_lora=mask_lora, p=0.4)
    tensors = operands(shape, torch.float32)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        if through == "eager":
            masked_lora_linear(**tensors, **shape.options)
        else:
            operator_call(shape, tensors, torch.tensor(SEED))
    of_the_caller = {tensor.untyped_storage().data_ptr() for tensor in tensors.values()}
    new = [tensor for tensor in kept if tensor.untyped_storage().data_ptr() not in of_the_caller]
    assert len(kept) > len(new)
    assert sorted(tuple(tensor.shape) for tensor in new) == ([()] if through == "operator" else []) + [(12, 4)]


def test_leading_dimensions_are_rows_and_no_generator_moves():
    tensors = operands(SOFT, torch.float32)
    flat = masked_lora_linear(**tensors, **SOFT.options)
    state = torch.get_rng_state()
    x = tensors.pop("x").detach().view(3, 4, -1)
    y = masked_lora_linear(x, **tensors, **SOFT.options | {"seed": torch.tensor(SEED)})
    assert torch.equal(y.view(12, -1), flat) and torch.equal(torch.get_rng_state(), state)


BAD = [
    ({"dropout": 1.0, "seed": 0}, "dropout is 1.0: give a probability of at least 0 and below 1"),
    ({"dropout": -0.1, "seed": 0}, "dropout is -0.1"),
    ({"dropout": float("nan"), "seed": 0}, "dropout is nan"),
    ({"dropout": 0.1}, "dropout needs a seed"),
    ({"dropout": 0.1, "seed": 2**63}, "seed is 9223372036854775808: give one that fits into int64"),
    ({"dropout": 0.1, "seed": torch.tensor([1])}, r"seed is a torch.int64 tensor of shape \[1\] on cpu: give"),
    ({"dropout": 0.1, "seed": torch.tensor(1.0)}, "seed is a torch.float32 tensor"),
    ({"dropout": 0.1, "seed": torch.tensor(1, device="meta")}, r"shape \[\] on meta"),
    ({"dropout": 0.1, "seed": 0, "lora_input": torch.ones(12, 28)}, "leave lora_input out, or dropout at 0"),
]


@pytest.mark.parametrize(("changed", "message"), BAD)
@pytest.mark.parametrize("masked", [True, False])
def test_wrong_dropout_is_one_clear_sentence(masked, changed, message):
    shape = Shape(dropout=False) if masked else Shape(out_mask=None, in_mask=None, bias=False, dropout=False)
    with pytest.raises(ValueError, match=message):
        masked_lora_linear(**{**operands(shape, torch.float32), **changed}, scaling=1.0)


# On its own

P = 0.3


def matrix(*shape, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype).requires_grad_()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("backend", ["auto", *backends("lora_dropout", device="cpu")])
def test_values_and_gradient_are_those_of_the_definition(backend, dtype):
    x = matrix(3, 7, 30, dtype=dtype)
    y = lora_dropout(x, P, SEED, backend=backend)
    keep = dropped(torch.ones(21, 30), Dropout(P, SEED)).view(3, 7, 30)
    assert_close(y, dropped(x.detach().view(21, 30), Dropout(P, SEED)).view(3, 7, 30))
    assert_close(torch.autograd.grad(y, x, torch.ones_like(y))[0], keep.to(dtype))
    assert 0.5 < (y != 0).float().mean() < 0.9


def test_gradcheck_and_second_order():
    x = torch.randn(4, 9, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: lora_dropout(x, P, SEED), x)
    assert torch.autograd.gradgradcheck(lambda x: lora_dropout(x, P, SEED), x)


def test_nothing_of_x_is_saved_and_no_dropout_is_x_itself():
    x = matrix(8, 16)
    assert saved_shapes(lambda: lora_dropout(x, P, SEED)) == []
    assert lora_dropout(x, 0.0, SEED) is x
    with pytest.raises(ValueError, match=r"x is torch.int64 of shape \[8, 16\]: give a floating tensor"):
        lora_dropout(x.long(), P, SEED)


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_whole_and_no_more_for_new_seeds(dynamic):
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(lora_dropout, fullgraph=True, dynamic=dynamic, backend=counter)
    x, frames = matrix(5, 12), []
    for seed in (1, 2, 3, 4):
        y = compiled(x, P, torch.tensor(seed))
        assert torch.equal(y, lora_dropout(x, P, seed))
        assert torch.equal(torch.autograd.grad(y.sum(), x)[0], lora_dropout(torch.ones_like(x), P, seed))
        frames.append(counter.frame_count)
    assert frames[1:] == frames[1:2] * 3


# A seed on the device, which kernels read and the host does not; on a CPU a tensor stands in for it

UNREAD = [name for name in ("reference", "triton") if name in backends("masked_lora_linear")]
SHAPES = [Shape(m=20, n=24, k=40, mask_lora=mask_lora, p=0.4) for mask_lora in (False, True)]
X = torch.ones(6, 20, device=DEVICE)


@pytest.fixture
def placed(monkeypatch):
    """Makes a seed that is taken for one on the device."""
    monkeypatch.setattr(dropout_op, "unread", lambda seed: seed)
    return partial(torch.tensor, device=DEVICE)


@pytest.mark.parametrize("seed", [SEED, 3, -1, 2**32 + 5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("backend", UNREAD)
def test_a_placed_seed_drops_what_the_same_seed_on_the_host_does(placed, backend, shape, dtype, seed):
    tensors = on_device(operands(shape, dtype))
    options = shape.options | {"backend": backend}
    found, alone = [], []
    for each in (placed(seed), seed):
        found.append(with_gradients((masked_lora_linear(**tensors, **options | {"seed": each}),), tensors))
        y = lora_dropout(tensors["x"], 0.5, each, backend=backend)
        alone.append((y, *torch.autograd.grad(y.sum(), tensors["x"])))
    assert_close(found[0], found[1], rtol=0, atol=0)
    assert all(map(torch.equal, *alone))


def test_the_definition_reads_no_seed_on_the_host():
    values, seed = torch.empty(5, 6, device="meta"), torch.empty((), dtype=torch.int64, device="meta")
    assert definition.dropped(values, Dropout(0.5, seed)).shape == (5, 6)


def test_a_placed_seed_that_changes_before_backward_is_refused(placed):
    tensors, seed = on_device(operands(SHAPES[0], torch.float32)), placed(SEED)
    x = X.clone().requires_grad_()
    masked = masked_lora_linear(**tensors, **SHAPES[0].options | {"seed": seed})
    results = masked, lora_dropout(x, 0.5, seed)
    seed.add_(1)
    for result in results:
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            result.sum().backward()


def test_a_seed_lies_on_the_cpu_or_beside_the_input():
    here, there, seed = X.cpu(), X.to("meta"), torch.tensor(1)
    for x, good in ((here, seed), (there, seed), (there, seed.to("meta"))):
        check_dropout(x, 0.5, good, None)
    message = r"seed is a torch.* tensor .*: give an int or a 0-d int64 tensor {}\."
    for x, bad, places in ((here, seed.to("meta"), "on the CPU"), (there, seed.float(), "on the CPU or on meta")):
        with pytest.raises(ValueError, match=message.format(places)):
            check_dropout(x, 0.5, bad, None)


def test_a_graph_takes_a_seed_on_the_device_alone(monkeypatch):
    x = X.to("meta")
    host = [new_seed(x) for _ in range(2)]
    assert all(seed.device.type == "cpu" for seed in host) and not torch.equal(*host)
    monkeypatch.setattr(checks, "is_capturing", lambda device: True)
    monkeypatch.setattr("atp_kernels.dropout.is_capturing", lambda device: True)
    with pytest.raises(RuntimeError, match="a CUDA graph cannot capture dropout with a seed on the host"):
        check_dropout(x, 0.5, host[0], None)
    drawn = new_seed(x)
    assert drawn.device == x.device
    check_dropout(x, 0.5, drawn, None)
