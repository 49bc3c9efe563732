"""While a CUDA graph is captured: what its replays could not repeat is refused, and group operations copy no table.

No graph is captured here; the kernels are told that one is.
"""

from contextlib import contextmanager

import pytest
import torch
from backends_here import DEVICE, backends

import atp_kernels
from atp_kernels import GroupPlan, KeptFirst, KeptSlice, checks
from atp_kernels.groups import op as group_op

MASK = torch.tensor([True, False, True], device=DEVICE)
INDEX, FIRST = torch.arange(3, device=DEVICE), torch.zeros(1, dtype=torch.int64, device=DEVICE)
X, WEIGHT, LORA_A, LORA_B = (torch.ones(size, device=DEVICE) for size in ((2, 4), (3, 4), (1, 4), (3, 1)))
REMOVED = MASK
needs_triton = pytest.mark.skipif("triton" not in backends("group_lasso"), reason="needs Triton")


@pytest.fixture
def capture(monkeypatch):
    """A capture begins where this is called, on whatever device."""
    return lambda: monkeypatch.setattr(checks, "is_capturing", lambda device: True)


@pytest.mark.parametrize("on", [False, True])
def test_a_capture_is_one_of_the_device_s_current_stream(monkeypatch, on):
    """Whichever device is current: torch asks that one alone."""
    current = [0]

    @contextmanager
    def device(wanted):
        before, current[0] = current[0], wanted.index
        yield
        current[0] = before

    monkeypatch.setattr(torch.cuda, "device", device)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: on and current == [1])
    assert checks.is_capturing(torch.device("cuda", 1)) is on and current == [0]
    assert not checks.is_capturing(torch.device("cuda", 0))
    assert not checks.is_capturing(torch.device("cpu"))


def linear(**options):
    return atp_kernels.masked_lora_linear(X, WEIGHT, LORA_A, LORA_B, scaling=1.0, **options)


DROPOUT = "a CUDA graph cannot capture dropout with a seed on the host, which every replay would repeat: give the seed"
SLICES = "a CUDA graph cannot capture the making of a KeptFirst or KeptSlice, which the host does: make it before"
REFUSED = {
    "compact rows": (lambda: atp_kernels.compact(WEIGHT, FIRST), "compact, which reads its indices on the"),
    "compact cols": (lambda: atp_kernels.compact(WEIGHT, None, FIRST), "call it before the capture"),
    "dropout": (lambda: atp_kernels.lora_dropout(X, 0.5, 1), DROPOUT),
    "linear": (lambda: linear(dropout=0.5, seed=1), DROPOUT),
    "seed in a tensor": (lambda: linear(dropout=0.5, seed=torch.tensor(1)), DROPOUT),
    "kept first": (lambda: KeptFirst(MASK), SLICES),
    "slice": (lambda: KeptSlice(WEIGHT, out_mask=MASK), SLICES),
    "plan": (lambda: GroupPlan.of([WEIGHT], [(0, INDEX)], 3), "capture the making of a GroupPlan: make it"),
    "groups": (lambda: atp_kernels.group_lasso([WEIGHT], [(0, INDEX)], REMOVED), "hand it to the operations"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_a_replay_would_not_repeat_is_refused(capture, name):
    call, message = REFUSED[name]
    call()
    capture()
    with pytest.raises(RuntimeError, match=message):
        call()


def test_what_a_replay_repeats_is_not_refused(capture):
    slice_, held = (KeptSlice(WEIGHT, out_mask=INDEX < 1, pad_to=1) for _ in range(2))
    held.weight(torch.float32)
    capture()
    assert linear(out_mask=MASK).tolist() == [[8, 4, 8]] * 2
    assert torch.equal(atp_kernels.lora_dropout(X, 0.0, 1), X)
    assert torch.equal(atp_kernels.compact(WEIGHT), WEIGHT)
    options = {"scaling": 1.0}
    assert atp_kernels.kept_lora_linear(X, held, LORA_A, LORA_B, **options).tolist() == [[8, 4, 4]] * 2
    with pytest.raises(RuntimeError, match="holds no .* weight: call weight.* before compiling or capturing"):
        atp_kernels.kept_lora_linear(X, slice_, LORA_A, LORA_B, **options)


def problem():
    """Leaves with gradients, their plan, and which groups are removed."""
    rng = torch.Generator().manual_seed(0)
    factors = [torch.randn(shape, generator=rng).to(DEVICE).requires_grad_() for shape in ((3, 4), (2, 3), (0, 4))]
    for factor in factors:
        factor.grad = torch.ones_like(factor)
    return factors, GroupPlan.of(factors, [(0, INDEX), (1, INDEX), (0, INDEX[:0])], 3)


def lasso(factors, plan, backend):
    value = atp_kernels.group_lasso(factors, plan, REMOVED, backend=backend)
    return value.detach(), *torch.autograd.grad(value, factors)


def lasso_grad(factors, plan, backend):
    for factor in factors:
        factor.grad.fill_(1)
    value = atp_kernels.group_lasso_grad_(factors, plan, REMOVED, weight=0.37, backend=backend)
    return value, *(factor.grad.clone() for factor in factors)


def prox(factors, plan, backend):
    before = [factor.detach().clone() for factor in factors]
    atp_kernels.group_prox_(factors, plan, REMOVED, 0.5, backend=backend)
    after = [factor.detach().clone() for factor in factors]
    with torch.no_grad():
        for factor, old in zip(factors, before, strict=True):
            factor.copy_(old)
    return after


CALLS = [lasso, lasso_grad, prox]


@needs_triton
@pytest.mark.parametrize("call", CALLS)
def test_a_group_operation_that_was_called_before_is_captured(capture, call):
    factors, plan = problem()
    expected = call(factors, plan, "triton")
    torch.testing.assert_close(expected, call(factors, plan, "reference"))
    held = list(plan._tables.values())
    assert all(map(torch.equal, call(factors, plan, "triton"), expected))
    capture()
    assert all(map(torch.equal, call(factors, plan, "triton"), expected))
    assert {id(table) for table in plan._tables.values()} == {id(table) for table in held}  # none was copied again


@needs_triton
@pytest.mark.parametrize("call", CALLS)
def test_a_group_operation_without_a_table_is_refused(capture, call):
    factors, plan = problem()
    capture()
    with pytest.raises(RuntimeError, match="call it once before with the same GroupPlan, factors and gradients"):
        call(factors, plan, "triton")


@needs_triton
def test_a_gradient_in_another_place_has_no_table(capture):
    factors, plan = problem()
    lasso_grad(factors, plan, "triton")
    capture()
    factors[1].grad = factors[1].grad.clone()
    with pytest.raises(RuntimeError, match="whose table of factors would have to be copied from the host"):
        lasso_grad(factors, plan, "triton")


@needs_triton
def test_a_table_in_a_graph_is_kept_and_others_make_room(monkeypatch):
    factors, plan = problem()
    lasso_grad(factors, plan, "triton")
    (table,) = plan._tables.values()
    with monkeypatch.context() as patch:
        patch.setattr(checks, "is_capturing", lambda device: True)
        lasso_grad(factors, plan, "triton")
    contents, places = table.clone(), []
    for _ in range(20):
        places.append(factors[0].grad)  # held, so that the next one lies elsewhere
        factors[0].grad = factors[0].grad.clone()
        value, *grads = lasso_grad(factors, plan, "triton")
    assert any(kept is table for kept in plan._tables.values()) and torch.equal(table, contents)
    assert len(plan._tables) == 9  # eight, and that of the graph
    torch.testing.assert_close((value, *grads), lasso_grad(factors, plan, "reference"))


@pytest.mark.skipif("native" not in backends("group_lasso"), reason="needs the extension")
@pytest.mark.parametrize("call", CALLS)
def test_native_group_operations_are_refused(capture, call):
    factors, plan = problem()
    call(factors, plan, "native")
    # On a CPU a plan of separate groups takes another path, which no graph can hold.
    plan.separate = False
    capture()
    with pytest.raises(RuntimeError, match="the native group operations, whose tables are on the host: use"):
        call(factors, plan, "native")


def test_a_weight_that_a_graph_makes_is_not_found_by_eager_calls(capture):
    factors, plan = problem()
    lasso_grad(factors, plan, "reference")
    known = group_op._full.cache_info().currsize
    capture()
    atp_kernels.group_lasso_grad_(factors, plan, REMOVED, weight=0.123, backend="reference")
    assert group_op._full.cache_info().currsize == known
