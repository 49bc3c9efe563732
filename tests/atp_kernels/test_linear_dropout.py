"""Dropout in the masked LoRA linear: its random bits, and a call that draws them against one that is given them."""

from dataclasses import replace

import numpy
import pytest
import torch
from linear_cases import SEED, Shape, operands

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


def test_blocks_of_rows_do_not_show(monkeypatch):
    x = torch.rand(50, 13)
    whole = dropped(x, Dropout(0.3, SEED))
    monkeypatch.setattr(aten, "CACHED_ELEMENTS", 40)
    assert torch.equal(aten.dropped(x, Dropout(0.3, SEED)), whole)


def given_the_dropped_input(shape, tensors):
    """The same call with the dropout made outside of it, by autograd."""
    given = dropped(tensors["x"], shape.drawn)
    return masked_lora_linear_with_norms(**tensors, **replace(shape, p=0.0).options, lora_input=given)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_forward_equals_a_dropped_input_that_is_given_in_every_bit(dtype):
    tensors = operands(SOFT, dtype)
    y = masked_lora_linear(**tensors, **SOFT.options)
    assert torch.equal(y, given_the_dropped_input(SOFT, tensors)[0])


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
