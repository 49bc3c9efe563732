"""Dropout in the masked LoRA linear: its random bits, and a call that draws them against one that is given them."""

from dataclasses import replace

import numpy
import pytest
import torch
from linear_cases import SEED, Shape, every_combination, operands, with_gradients
from torch.utils.checkpoint import checkpoint

from atp_kernels import masked_lora_linear, masked_lora_linear_with_norms
from atp_kernels.dropout import aten
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


def test_no_element_is_dropped_at_probability_zero():
    x = torch.rand(100, 100)
    assert torch.equal(dropped(x, Dropout(0.0, SEED)), x)


@pytest.mark.parametrize("p", [0.05, 0.5, 0.9])
def test_keep_rate_and_independence(p):
    """Within 5 standard deviations; elements, rows, columns and seeds that are next to each other do not correlate."""
    first, second = (dropped(torch.ones(512, 512), Dropout(p, seed)) for seed in (5, 6))
    n, variance = first.numel(), p * (1 - p)
    centred = (first > 0).double() - (1 - p)
    assert abs(centred.mean()) < 5 * (variance / n) ** 0.5
    for side in (0, 1):
        assert centred.mean(side).abs().max() < 5 * (variance / 512) ** 0.5
    other = (second > 0).double() - (1 - p)
    for name, left, right in (
        ("seeds", centred, other),
        ("rows", centred[1:], centred[:-1]),
        ("columns", centred[:, 1:], centred[:, :-1]),
        ("words of the same place", centred[:, 4:], centred[:, :-4]),
    ):
        assert abs((left * right).mean()) < 5 * variance / left.numel() ** 0.5, name


def test_blocks_of_rows_do_not_show(monkeypatch):
    x = torch.rand(50, 13)
    whole = dropped(x, Dropout(0.3, SEED))
    monkeypatch.setattr(aten, "CACHED_ELEMENTS", 40)
    assert torch.equal(aten.dropped(x, Dropout(0.3, SEED)), whole)


def given_the_dropped_input(shape, tensors):
    """The same call with the dropout made outside of it, by autograd."""
    given = dropped(tensors["x"], shape.drawn)
    return masked_lora_linear_with_norms(**tensors, **replace(shape, p=0.0).options, lora_input=given)


@pytest.mark.parametrize("shape", every_combination(Shape(p=0.4)), ids=str)
def test_equals_a_dropped_input_that_is_given(shape):
    tensors = operands(shape, torch.float64)
    got = with_gradients(masked_lora_linear_with_norms(**tensors, **shape.options), tensors)
    expected = with_gradients(given_the_dropped_input(shape, tensors), tensors)
    for name, value in got.items():
        torch.testing.assert_close(value, expected[name], msg=name)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_forward_equals_a_dropped_input_that_is_given_in_every_bit(dtype):
    tensors = operands(SOFT, dtype)
    y = masked_lora_linear(**tensors, **SOFT.options)
    assert torch.equal(y, given_the_dropped_input(SOFT, tensors)[0])


@pytest.mark.parametrize("wanted", ["x", "weight", "lora_a", "lora_b", "bias", "out_mask", "in_mask"])
def test_each_gradient_alone(wanted):
    tensors = operands(SOFT, torch.float64)
    every = with_gradients((masked_lora_linear(**tensors, **SOFT.options),), tensors)
    alone = {name: tensor.detach().requires_grad_(name == wanted) for name, tensor in tensors.items()}
    got = with_gradients((masked_lora_linear(**alone, **SOFT.options),), alone)
    torch.testing.assert_close(got[f"d {wanted}"], every[f"d {wanted}"])


def operator_call(shape, tensors, seed):
    arguments = [tensors.get(name) for name in ORDER]
    arguments += [shape.scaling, shape.mask_lora, shape.out_mask == "soft", True, shape.p, seed, "reference"]
    y, _, _, *norms = op.masked_lora_linear_op(*arguments)
    return y, *norms


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


def test_operator_equals_eager():
    tensors = operands(SOFT, torch.float32)
    got = with_gradients(operator_call(SOFT, tensors, torch.tensor(SEED)), tensors)
    eager = masked_lora_linear_with_norms(**tensors, **SOFT.options, backend="reference")
    expected = with_gradients(eager, tensors)
    for name, value in got.items():
        assert torch.equal(value, expected[name]), name


def test_opcheck():
    t = operands(Shape(m=5, n=6, k=7, rank=2, mask_lora=True, p=0.4), torch.float32)
    drawn = (0.4, torch.tensor(SEED), "reference")
    arguments = [t.get(name) for name in ORDER] + [1.5, True, True, True, *drawn]
    torch.library.opcheck(op.masked_lora_linear_op, tuple(arguments))
    t = {name: tensor.detach() for name, tensor in t.items()}
    saved = [t.get(name) for name in ("x", "weight", "lora_a", "lora_b", "lora_input", "out_mask", "in_mask")]
    needs = [True] * 5 + [False] + [True] * 2
    arguments = (torch.randn(5, 6), *saved, torch.randn(5, 2), torch.randn(5, 6), 1.5, True, True, needs, *drawn)
    torch.library.opcheck(op.masked_lora_linear_backward_op, arguments)


@pytest.mark.parametrize("dynamic", [False, True])
def test_a_new_seed_is_no_new_compilation(dynamic):
    torch._dynamo.reset()
    aot_eager, graphs = torch._dynamo.lookup_backend("aot_eager"), []

    def counted(graph, inputs):
        graphs.append(graph)
        return aot_eager(graph, inputs)

    def step(tensors, seed):
        return (masked_lora_linear(**tensors, **SOFT.options | {"seed": seed}),)

    compiled = torch.compile(step, fullgraph=True, dynamic=dynamic, backend=counted)
    tensors = operands(SOFT, torch.float32)
    results, compiled_so_far = [], []
    for seed in (3, 2**40, SEED):
        got = with_gradients(compiled(tensors, torch.tensor(seed)), tensors)
        expected = with_gradients(step(tensors, seed), tensors)
        for name, value in got.items():
            torch.testing.assert_close(value, expected[name], msg=name)
        results.append(got["d lora_a"])
        compiled_so_far.append(len(graphs))
    assert len(set(compiled_so_far)) == 1
    assert not any(torch.equal(results[i], results[i - 1]) for i in range(3))


def test_an_int_compiles_too():
    torch._dynamo.reset()
    tensors = operands(SOFT, torch.float32)
    compiled = torch.compile(masked_lora_linear, fullgraph=True, backend="aot_eager")
    for seed in (3, 4, 2**40, SEED):
        options = SOFT.options | {"seed": seed}
        torch.testing.assert_close(compiled(**tensors, **options), masked_lora_linear(**tensors, **options))


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradient_checkpointing(use_reentrant):
    """The recomputed forward drops the same elements, though no generator's state is kept for it."""
    tensors = operands(SOFT, torch.float64)
    x, others = tensors.pop("x"), tensors

    def block(x):
        return masked_lora_linear(x, **others, **SOFT.options).square()

    plain = torch.autograd.grad(block(x).sum(), [x, *others.values()])
    checkpoint(block, x, use_reentrant=use_reentrant, preserve_rng_state=False).sum().backward()
    for tensor, grad in zip([x, *others.values()], plain, strict=True):
        torch.testing.assert_close(tensor.grad, grad)


def test_second_backward_draws_the_same_elements():
    tensors = operands(SOFT, torch.float32)
    y = masked_lora_linear(**tensors, **SOFT.options)
    leaves = list(tensors.values())
    first = torch.autograd.grad(y.sum(), leaves, retain_graph=True)
    second = torch.autograd.grad(y.sum(), leaves)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_autocast_drops_after_the_cast():
    tensors = operands(SOFT, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        y = masked_lora_linear(**tensors, **SOFT.options)
    cast = {name: tensor if "mask" in name else tensor.bfloat16() for name, tensor in tensors.items()}
    assert torch.equal(y, masked_lora_linear(**cast, **SOFT.options))
    y.float().sum().backward()
    assert all(tensor.grad.dtype == torch.float32 for tensor in tensors.values())


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
    ({"dropout": 0.1}, "dropout needs a seed"),
    ({"dropout": 0.1, "seed": 2**63}, "seed is 9223372036854775808: give one that fits into int64"),
    ({"dropout": 0.1, "seed": torch.tensor([1])}, r"seed is a torch.int64 tensor of shape \[1\] on cpu: give"),
    ({"dropout": 0.1, "seed": torch.tensor(1.0)}, "seed is a torch.float32 tensor"),
    ({"dropout": 0.1, "seed": torch.tensor(1, device="meta")}, r"shape \[\] on meta"),
    ({"dropout": 0.1, "seed": 0, "lora_input": torch.ones(12, 28)}, "leave lora_input out, or dropout at 0"),
]


@pytest.mark.parametrize(("changed", "message"), BAD)
@pytest.mark.parametrize("linear", [masked_lora_linear, masked_lora_linear_with_norms])
def test_wrong_dropout_is_one_clear_sentence(linear, changed, message):
    with pytest.raises(ValueError, match=message):
        linear(**{**operands(Shape(dropout=False), torch.float32), **changed}, scaling=1.0)
