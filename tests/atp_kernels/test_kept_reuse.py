"""A slice in the memory of an earlier one: at its addresses, with the results of a fresh slice, and in its place."""

import pytest
import torch
from torch import nn

from atp_kernels import KeptFirst, KeptSlice, kept_lora_linear

N, K, R = 70, 50, 3
FORMS = ("kept first", "model's order")


def mask(size, kept, seed):
    rng = torch.Generator().manual_seed(seed)
    return torch.zeros(size, dtype=torch.bool).index_fill_(0, torch.randperm(size, generator=rng)[:kept], True)


def sides(form, out_kept, in_kept, seed, reuse=(None, None)):
    """Masks of outputs and inputs in a form."""
    masks = mask(N, out_kept, seed), mask(K, in_kept, seed + 1)
    if form == FORMS[1]:
        return masks
    return tuple(KeptFirst(given, pad_to=8, reuse=old) for given, old in zip(masks, reuse, strict=True))


def slice_of(linear, outs, ins, **options):
    return KeptSlice(linear.weight, linear.bias, out_mask=outs, in_mask=ins, pad_to=8, **options)


def results(kept, dtype=torch.float32):
    rng = torch.Generator().manual_seed(7)
    x, a, b = (torch.randn(size, generator=rng).to(dtype).requires_grad_() for size in ((9, K), (R, K), (N, R)))
    y = kept_lora_linear(x, kept, a, b, scaling=0.5)
    return [y, *torch.autograd.grad(y.square().sum(), (x, a, b))]


def addresses(kept):
    tensors = [kept.weight(torch.float32), kept.bias(torch.float32)]
    tensors += [part for side in kept.sides if side is not None for part in (side.index, side.place)]
    return [tensor.data_ptr() for tensor in tensors]


@pytest.fixture
def linear():
    torch.manual_seed(0)
    return nn.Linear(K, N).requires_grad_(False)


@pytest.mark.parametrize("form", FORMS)
def test_another_decision_of_the_same_widths_lies_where_the_last_did(linear, form):
    first = sides(form, 39, 30, 0)
    old = slice_of(linear, *first)
    results(old)
    before = addresses(old)
    again = sides(form, 37, 28, 2, first)  # as many multiples of eight
    new, fresh = slice_of(linear, *again, reuse=old), slice_of(linear, *sides(form, 37, 28, 2))
    assert new.same_memory and not fresh.same_memory and addresses(new) == before
    assert all(map(torch.equal, results(new), results(fresh)))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kept", [(20, 30), (40, 12), (N, 30), (40, K), (N, K), (0, 0), (N - 1, K - 1)])
def test_other_widths_take_memory_of_their_own_and_the_model_s_stays(linear, form, kept):
    weight, bias = linear.weight.clone(), linear.bias.clone()
    for start in (sides(form, 40, 30, 0), (None, None)):
        old = slice_of(linear, *start)
        results(old)
        reuse = start if form == FORMS[0] else (None, None)
        new = slice_of(linear, *sides(form, *kept, 2, reuse), reuse=old)
        assert new.same_memory is (kept == (N, K) and start == (None, None))
        assert all(map(torch.equal, results(new), results(slice_of(linear, *sides(form, *kept, 2)))))
        last = slice_of(linear, *sides(form, 40, 30, 4), reuse=new)
        assert all(map(torch.equal, results(last), results(slice_of(linear, *sides(form, 40, 30, 4)))))
    assert torch.equal(linear.weight, weight) and torch.equal(linear.bias, bias)


def test_a_slice_that_gave_its_memory_is_refused(linear):
    first = sides(FORMS[0], 40, 30, 0)
    old, other = slice_of(linear, *first), slice_of(linear, first[0], None)
    zeroed = old.zeroed
    y = kept_lora_linear(torch.ones(2, K, requires_grad=True), old, torch.ones(R, K), torch.ones(N, R), scaling=1.0)
    outs = KeptFirst(mask(N, 39, 1), pad_to=8, reuse=first[0])
    new = slice_of(linear, outs, first[1], reuse=old)
    message = "^this KeptSlice gave its memory to a newer one: use that, after the backward pass.$"
    by_place = slice_of(linear, *sides(FORMS[1], 40, 30, 0))
    results(by_place.zeroed)
    slice_of(linear, *sides(FORMS[1], 40, 30, 2), reuse=by_place)
    for gone in (old, other, zeroed, by_place.zeroed):
        with pytest.raises(RuntimeError, match=message):
            results(gone)
    with pytest.raises(RuntimeError, match=message):
        y.sum().backward()
    assert not old.fits(*first) and new.fits(outs, first[1])


@pytest.mark.parametrize(
    ("start", "then", "reused"),
    [
        ((39, 30), (37, 28), False),
        ((39, K - 1), (37, K), True),  # though as wide as before: one input less would have been padded to all
    ],
    ids=["an order in memory of its own", "a side that is whole again"],
)
def test_what_is_not_the_same_memory(linear, start, then, reused):
    first = sides(FORMS[0], *start, 0)
    old = slice_of(linear, *first)
    results(old)
    new = slice_of(linear, *sides(FORMS[0], *then, 2, first if reused else (None, None)), reuse=old)
    assert not new.same_memory
    assert all(map(torch.equal, results(new), results(slice_of(linear, *sides(FORMS[0], *then, 2)))))


def test_memory_is_given_once(linear):
    """Else two slices that are in use would share it."""
    first = sides(FORMS[0], 40, 30, 0)
    old = slice_of(linear, *first)
    results(old)
    one = slice_of(linear, *sides(FORMS[0], 40, 30, 2, first), reuse=old)
    expected = results(one)
    two = slice_of(linear, *sides(FORMS[0], 40, 30, 4, first), reuse=old)
    assert not two.same_memory and not set(addresses(one)) & set(addresses(two))
    assert all(map(torch.equal, results(one), expected))


def test_an_unused_slice_and_another_dtype_are_no_obstacle(linear):
    first = sides(FORMS[1], 40, 30, 0)
    assert not slice_of(linear, *sides(FORMS[1], 40, 30, 2), reuse=slice_of(linear, *first)).same_memory
    old = slice_of(linear, *first)
    held = old.weight(torch.bfloat16).data_ptr()
    new = slice_of(linear, *sides(FORMS[1], 40, 30, 2), reuse=old)
    assert new.same_memory and new.weight(torch.bfloat16).data_ptr() == held
    fresh = slice_of(linear, *sides(FORMS[1], 40, 30, 2))
    assert all(map(torch.equal, results(new), results(fresh)))


def test_inference_tensors_keep_their_memory(linear):
    with torch.inference_mode():
        first = sides(FORMS[0], 40, 30, 0)
        old = slice_of(linear, *first)
        old.weight(torch.float32)
    again = sides(FORMS[0], 40, 30, 2, first)
    new = slice_of(linear, *again, reuse=old)
    assert not new.same_memory
    assert all(map(torch.equal, results(new), results(slice_of(linear, *sides(FORMS[0], 40, 30, 2)))))
