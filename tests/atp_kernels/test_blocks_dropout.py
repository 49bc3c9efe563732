"""Dropout of what adapters read, in blocks and on kept slices: one draw for each input, made again in backward."""

from functools import partial

import pytest
import torch
from backends_here import backends
from block_cases import EQUAL, QKV, Case, assert_as_good_as, mlp_case, saved_shapes, slices_of
from linear_cases import SEED
from torch.testing import assert_close

from atp_kernels import KeptFirst, KeptSlice, kept_lora_linear, masked_lora_qkv, masked_lora_swiglu
from atp_kernels.dropout import op as dropout_op
from atp_kernels.dropout.definition import Dropout, dropped
from atp_kernels.kept.definition import kept_lora_linear as defined_kept
from atp_kernels.linear.definition import masked_lora_linear as defined_linear
from atp_kernels.qkv.definition import masked_lora_qkv as defined_qkv
from atp_kernels.swiglu.definition import masked_lora_swiglu as defined_swiglu

P, SEEDS = 0.4, (SEED, 3)
DROPS = tuple(Dropout(P, seed) for seed in SEEDS)
ONE = ((20, 12),)
ORDERS = ("whole", "in order", "kept first")
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)


def laid(mask, order):
    """A hard mask as a slice takes it."""
    return None if order == "whole" else mask if order == "in order" else KeptFirst(mask, pad_to=1)


def in_order(values, side):
    """Values of the model's order in that of a side, and those of a side in the model's."""
    return values[..., side.index] if isinstance(side, KeptFirst) else values


def back(values, side):
    return values[..., side.place] if isinstance(side, KeptFirst) else values


def drop_in_order(values, side, drop):
    """What the adapter reads, in the model's order: drawn where the values lie."""
    there = in_order(values, side)
    return back(dropped(there.flatten(0, -2), drop).view(there.shape), side)


def kept_case(dtype, outs, ins):
    """(case, its slice, sides, the definition with the same dropped input)."""
    case = Case(ONE, mask="hard", dtype=dtype, frozen=True)
    in_mask = torch.arange(12) % 3 > 0
    sides = laid(case.masks[0], outs), laid(in_mask, ins)
    weight, bias = case.leaves["0 weight"], case.leaves["0 bias"]
    masks = [None if side is None else mask for side, mask in zip(sides, (case.masks[0], in_mask), strict=True)]

    def definition(case):
        ((weight, a, b, scaling, bias),) = case.linears(EQUAL[:1])
        read = drop_in_order(case.x, sides[1], DROPS[0])
        given = {"out_mask": masks[0], "in_mask": masks[1], "bias": bias, "lora_input": read}
        return defined_kept(case.x, weight, a, b, scaling=scaling, **given)

    return case, KeptSlice(weight, bias, out_mask=sides[0], in_mask=sides[1], pad_to=1), sides, definition


def kept_call(case, kept, x=None, **options):
    ((_, a, b, scaling, _),) = case.linears(EQUAL[:1])
    drawn = {"dropout": P, "seed": SEED} | options
    return kept_lora_linear(case.x if x is None else x, kept, a, b, scaling=scaling, **drawn)


@DTYPES
@pytest.mark.parametrize("ins", ORDERS)
@pytest.mark.parametrize("outs", ORDERS)
@pytest.mark.parametrize("backend", backends("kept_lora_linear"))
def test_kept_linear_is_no_worse_than_unfused(backend, outs, ins, dtype):
    case, kept, sides, definition = kept_case(dtype, outs, ins)
    y = kept_call(case, kept, in_order(case.x, sides[1]), backend=backend)
    assert_as_good_as(definition, case.results(back(y, sides[0])), case)


def qkv_case(dtype=torch.float64, order="whole", scalings=(1.7,) * 3):
    """(case, a call of it, the definition with the same dropped input)."""
    case = Case(QKV, mask=None if order == "whole" else "hard", dtype=dtype, frozen=True)
    sides = [laid(mask, order) for mask in case.masks]
    parts = zip(case.linears(), sides, strict=True)
    kept = None if order == "whole" else tuple(KeptSlice(p.weight, p.bias, out_mask=s, pad_to=1) for p, s in parts)

    def call(case, **options):
        given = {"kept": kept, "dropout": P, "seed": SEED, "backend": "reference"} | options
        y = masked_lora_qkv(case.x, *case.linears(scalings), **given)
        return tuple(back(part, side) for part, side in zip(y, sides, strict=True))

    def definition(case):
        return defined_qkv(case.x, *case.linears(scalings), masks=case.masks, dropout=DROPS[0])

    return case, call, definition


@DTYPES
@pytest.mark.parametrize("scalings", [(1.7,) * 3, (1.7, 0.6, 1.3)], ids=["shared", "alone"])
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("backend", ["auto", *backends("masked_lora_linear")])
def test_qkv_is_no_worse_than_unfused(backend, order, scalings, dtype):
    case, call, definition = qkv_case(dtype, order, scalings)
    assert_as_good_as(definition, case.results(call(case, backend=backend)), case)


def mlp(case, **options):
    given = {"mask": case.masks[0], "dropout": P, "seeds": SEEDS} | options
    return masked_lora_swiglu(case.x, *case.linears(EQUAL), **given)


@DTYPES
@pytest.mark.parametrize("dropping", [False, True])
@pytest.mark.parametrize("order", ["in order", "kept first"])
@pytest.mark.parametrize("mask", ["hard", "empty", "full"])
@pytest.mark.parametrize("backend", ["auto", *backends("masked_lora_swiglu")])
def test_swiglu_on_kept_slices_is_no_worse_than_unfused(backend, mask, order, dropping, dtype):
    """Kept first, what down reads is drawn where the channels lie."""
    case = mlp_case(mask, dtype=dtype, frozen=True)
    kept, mask, drops = slices_of(case, order == "kept first", pad_to=1), case.masks[0], DROPS if dropping else (None,)

    def definition(case):
        *producers, (weight, a, b, scaling, bias) = case.linears(EQUAL)
        gate, up = (
            defined_linear(case.x, w, a, b, scaling=s, bias=c, out_mask=mask, dropout=drops[0])
            for w, a, b, s, c in producers
        )
        h = torch.nn.functional.silu(gate) * up
        read = drop_in_order(h, kept[2].in_mask, DROPS[1]) if dropping else None
        return defined_linear(h, weight, a, b, scaling=scaling, bias=bias, in_mask=mask, lora_input=read)

    got = case.results(mlp(case, mask=None, kept=kept, backend=backend, dropout=P if dropping else 0.0))
    assert_as_good_as(definition, got, case)


def every_call(dtype=torch.float64):
    """(case, call) of each operation and form, the calls taking other options."""
    alone, kept, _, _ = kept_case(dtype, "in order", "in order")
    yield "kept linear", alone, partial(kept_call, alone, kept)
    for order in ORDERS:
        case, call, _ = qkv_case(dtype, order)
        yield f"qkv, {order}", case, partial(call, case)
    for mask, backend in ((None, "reference"), ("hard", "auto"), ("soft", "auto")):
        case = mlp_case(mask, dtype=dtype, frozen=True)
        yield f"swiglu, {mask}", case, partial(mlp, case, backend=backend)
    case = mlp_case("hard", dtype=dtype, frozen=True)
    yield "swiglu, kept", case, partial(mlp, case, mask=None, kept=slices_of(case, True))


CALLS = [name for name, _, _ in every_call()]


def one(name, dtype=torch.float64):
    return next((case, call) for other, case, call in every_call(dtype) if other == name)


def with_seeds(name, make):
    return {"seeds": tuple(map(make, SEEDS))} if name.startswith("swiglu") else {"seed": make(SEED)}


@pytest.mark.parametrize("name", CALLS)
def test_at_probability_zero_it_is_the_call_without(name):
    case, call = one(name, torch.float32)
    none = {"seeds": None} if name.startswith("swiglu") else {"seed": None}
    expected = case.results(call(dropout=0.0, **none))
    assert_close(case.results(call(dropout=0.0)), expected, rtol=0, atol=0)
    assert not torch.equal(case.results(call())["y"], expected["y"])


@pytest.mark.parametrize("name", CALLS)
def test_seeds_on_the_device_drop_the_same_and_must_stay_as_they_are(name, monkeypatch):
    case, call = one(name)
    expected = case.results(call())
    assert_close(case.results(call(**with_seeds(name, torch.tensor))), expected, rtol=0, atol=0)
    monkeypatch.setattr(dropout_op, "unread", lambda seed: seed)  # a tensor on the CPU stands in for it
    options = with_seeds(name, torch.tensor) | {"backend": "reference"}  # native code reads a seed
    expected = case.results(call(backend="reference"))
    assert_close(case.results(call(**options)), expected, rtol=0, atol=0)
    for seed in options.get("seeds") or (options["seed"],):
        y = call(**options)
        seed.add_(1)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            case.results(y)


@pytest.mark.parametrize("name", [name for name in CALLS if name != "swiglu, soft"])
def test_what_was_dropped_is_not_saved(name):
    _, call = one(name, torch.float32)
    assert saved_shapes(call) == saved_shapes(partial(call, dropout=0.0))


@pytest.mark.parametrize("name", CALLS)
def test_linears_of_one_input_share_its_draw(name, monkeypatch):
    """Forward once for each input; backward once for that input, if A learns, and once for its gradient."""
    case, call = one(name)
    draws, draw = [], dropout_op._dropped
    monkeypatch.setattr(dropout_op, "_dropped", lambda *given: draws.append(given) or draw(*given))
    inputs = 2 if name.startswith("swiglu") else 1
    for learns in (True, False):
        if not learns:
            case.freeze("lora_a")
        y = call()
        assert len(draws) == inputs
        case.results(y)
        assert len(draws) == inputs * (3 if learns else 2)
        draws.clear()


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("make", [int, torch.tensor], ids=["int", "tensor"])
def test_compiled(name, make):
    torch._dynamo.reset()
    case, call = one(name)
    seeds = with_seeds(name, make)
    if "kept" in name or "order" in name or "first" in name:
        call()  # the slice must hold its weight
    compiled = torch.compile(lambda: call(**seeds), fullgraph=True, backend="aot_eager")
    for key, value in case.results(compiled()).items():
        assert_close(value, case.results(call())[key], msg=key)


@pytest.mark.parametrize("name", CALLS)
def test_wrong_dropout_is_one_clear_sentence(name):
    _, call = one(name)
    none = {"seeds": None} if name.startswith("swiglu") else {"seed": None}
    far = with_seeds(name, lambda seed: 2**63)
    wrong = (({"dropout": 1.0}, "dropout is 1.0: give"), (none, "needs a seed"), (far, "seed is 9223372036854775808"))
    for options, message in wrong:
        with pytest.raises(ValueError, match=message):
            call(**options)


def test_a_kept_linear_takes_either_dropout_or_an_input_of_its_adapter():
    case, kept, _, _ = kept_case(torch.float64, "whole", "whole")
    with pytest.raises(ValueError, match="leave lora_input out, or dropout at 0"):
        kept_call(case, kept, lora_input=case.x)


def test_a_constant_adapter_that_drops_is_no_part_of_the_weight():
    """Under autocast on a CPU one without dropout becomes that."""
    case = mlp_case(None, dtype=torch.float32, frozen=True)
    case.freeze("lora_a", "lora_b")
    with torch.autocast("cpu", torch.bfloat16):
        y, without = mlp(case), mlp(case, dropout=0.0)
    definition = defined_swiglu(case.x, *case.linears(EQUAL), dropouts=DROPS)
    assert 10 * (y - definition).norm() < (without - definition).norm()
