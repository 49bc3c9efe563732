"""The gated activation in Triton: natively on a GPU, else in Triton's interpreter."""

from functools import partial

import pytest
import torch
from backends_here import DEVICE, ON_GPU, new_memory_is_nan
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from atp_kernels import extension, triton_runtime
from atp_kernels.swiglu import aten, native

if not triton_runtime.AVAILABLE:
    pytest.skip(triton_runtime.REASON, allow_module_level=True)

from kernel_linear import FACTOR

from atp_kernels.swiglu import triton as backend

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
ACTIVATIONS = {"silu": F.silu, "gelu_tanh": partial(F.gelu, approximate="tanh")}
needs_native = pytest.mark.skipif(not extension.AVAILABLE, reason=str(extension.REASON))
INF, NAN = float("inf"), float("nan")


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    """So that small shapes have several tiles: 4 rows of 16 columns, or more rows of fewer."""
    monkeypatch.setattr(backend, "_TILE", 64)
    monkeypatch.setattr(backend, "_WIDEST_BLOCK", 16)


def problem(rows, width, dtype=torch.float32, mask=None, seed=0):
    """(upstream gradient, gate, up, mask); the soft mask has an exact 0 and a negative entry."""
    rng = torch.Generator().manual_seed(seed)
    d_h, gate, up = (2 * torch.randn(3, rows, width, generator=rng)).to(DEVICE, dtype)
    values = torch.rand(width, generator=rng).to(DEVICE)
    values[:2] = torch.tensor([0.0, -0.5], device=DEVICE)[: values[:2].numel()]
    masks = {None: None, "soft": values, "hard": values > 0.4, "empty": values > 1, "full": values < 1}
    return d_h, gate, up, masks[mask]


def computed(activation, d_h, gate, up, mask, in_place=False, module=backend):
    """h, d_gate and d_up, and the gradient of a floating mask."""
    h = module.gated(activation, gate, up, mask)
    own = d_h.clone() if in_place or module is not backend else d_h
    d_gate, d_up = own if in_place else torch.full_like(gate, NAN), torch.full_like(gate, NAN)
    soft = mask is not None and mask.is_floating_point()
    d_mask = module.gated_backward(activation, own, gate, up, d_gate, d_up, mask, soft)
    assert (d_mask is None) != soft
    return (h, d_gate, d_up, d_mask) if soft else (h, d_gate, d_up)


def defined(activation, d_h, gate, up, mask, dtype):
    """The same in plain PyTorch, as the linears and the activation would do it in this dtype."""
    gate, up = (tensor.detach().to(dtype).requires_grad_() for tensor in (gate, up))
    leaves, sides = [gate, up], (gate, up)
    if mask is not None:
        wide = torch.promote_types(dtype, torch.float32)
        if mask.is_floating_point():
            mask = mask.detach().to(wide).requires_grad_()
            leaves.append(mask)
        sides = [(tensor * mask).to(dtype) for tensor in sides]
    h = ACTIVATIONS[activation](sides[0]) * sides[1]
    return h.detach(), *torch.autograd.grad(h, leaves, d_h.to(dtype))


def check(activation, d_h, gate, up, mask, in_place=False, module=backend):
    """Errors against float64 at most those of plain PyTorch times FACTOR; one rounding is allowed in any case."""
    got = computed(activation, d_h, gate, up, mask, in_place, module)
    plain = defined(activation, d_h, gate, up, mask, gate.dtype)
    exact = defined(activation, d_h, gate, up, mask, torch.float64)
    terms = (d_h.double() * gate.double() * up.double()).abs().sum(0) if len(got) == 4 else None
    for value, other, truth, size in zip(got, plain, exact, [*exact[:3], terms], strict=False):
        assert value.dtype == other.dtype and value.shape == other.shape
        error, own = ((some.double() - truth).norm() for some in (value, other))
        assert error <= max(FACTOR[value.dtype] * own, torch.finfo(value.dtype).eps * size.norm())


@given(
    activation=st.sampled_from(list(ACTIVATIONS)),
    rows=st.sampled_from([1, 3, 4, 5, 30]),
    width=st.sampled_from([1, 2, 7, 15, 16, 17, 40]),
    dtype=st.sampled_from(DTYPES),
    mask=st.sampled_from([None, "soft", "hard", "empty", "full"]),
    in_place=st.booleans(),
)
@settings(max_examples=60, derandomize=True, deadline=None)
def test_error_is_no_worse_than_unfused(activation, rows, width, dtype, mask, in_place):
    check(activation, *problem(rows, width, dtype, mask), in_place=in_place)


@pytest.mark.parametrize("module", [aten, pytest.param(native, marks=needs_native)], ids=["aten", "native"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("mask", ["soft", "hard"])
@pytest.mark.parametrize("in_place", [False, True])
def test_the_other_backends_do_the_same(module, activation, mask, in_place):
    for dtype in (torch.float32, torch.bfloat16):
        d_h, gate, up, mask_values = (tensor.cpu() for tensor in problem(9, 40, dtype, mask))
        check(activation, d_h, gate, up, mask_values, in_place, module)
    both = torch.cat([gate, up], 1)
    halves, grads = both.chunk(2, 1), torch.full_like(both, NAN).chunk(2, 1)
    module.gated_backward(activation, d_h.clone(), *halves, *grads, mask_values)
    expected = computed(activation, d_h, gate, up, mask_values, False, module)[1:3]
    torch.testing.assert_close(grads, expected)


@pytest.mark.parametrize(("programs", "rows"), [(1, 9), (3, 40), (8, 41)])
def test_every_row_counts_once_in_the_mask_however_many_programs_there_are(monkeypatch, programs, rows):
    monkeypatch.setattr(backend, "_PROGRAMS", programs)
    check("gelu_tanh", *problem(rows, 37, mask="soft"))


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_limits(activation):
    gate = torch.tensor([[INF, -INF, 3e38, -3e38, 0.0, -0.0, 1e-45, NAN, -NAN]], device=DEVICE)
    ones = torch.ones_like(gate)
    h, d_gate, d_up = (tensor.cpu() for tensor in computed(activation, ones, gate, ones, None))
    assert torch.equal(h[0, :6], torch.tensor([INF, 0, 3e38, 0, 0, 0]))
    assert torch.equal(d_gate[0, :7], torch.tensor([1, 0, 1, 0, 0.5, 0.5, 0.5]))
    assert torch.equal(d_up[0, :6], h[0, :6])
    assert all(result[0, 7:].isnan().all() for result in (h, d_gate, d_up))


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_error_over_the_range_of_the_gate(activation):
    """Where the float64 result is a normal float32 number, it is right to a few units at every single gate."""
    gate = torch.cat([torch.linspace(-90, 90, 4000), torch.linspace(-2, 2, 4000)]).view(100, 80).to(DEVICE)
    ones = torch.ones_like(gate)
    exact = gate.double().requires_grad_()
    scale = {"silu": 1.0, "gelu_tanh": 1.5957691216057308}[activation]
    z = exact if activation == "silu" else scale * (exact + 0.044715 * exact**3)
    value = exact * torch.sigmoid(z)
    (slope,) = torch.autograd.grad(value.sum(), exact)
    h, d_gate, _ = computed(activation, ones, gate, ones, None)
    normal = value.abs() > 1e-37
    # exp multiplies the rounding error of z by z.
    allowed = 8 * (1 + z.detach().abs()) * torch.finfo(torch.float32).eps
    assert ((h - value).abs() <= allowed * value.abs())[normal].all()
    assert ((d_gate - slope).abs() <= allowed * (value.abs() + torch.sigmoid(z) * (1 + z.abs())))[normal].all()
    # Far out the slope is 1 plus what only 1 - sigmoid without cancellation gets right; a GPU divides less exactly.
    far, units = z > 10, 6 if ON_GPU else 3
    assert ((d_gate - slope).abs() <= units * torch.finfo(torch.float32).eps * slope)[far].all()


@pytest.mark.parametrize("hard", [True, False])
def test_a_removed_channel_is_exactly_zero_whatever_it_holds(hard):
    d_h, gate, up, mask = problem(9, 20, mask="hard" if hard else "soft")
    removed = (mask == 0).nonzero().flatten()[:1]
    gate[0, removed], gate[1, removed], up[2, removed], up[3, removed] = NAN, INF, INF, -INF
    d_h[4, removed] = INF
    h, d_gate, d_up = computed("silu", d_h, gate, up, mask)[:3]
    for value in (h, d_gate, d_up):
        assert not value[:, removed].any() and value.isfinite().all()


def test_any_memory_layout():
    d_h, gate, up, mask = problem(11, 33, mask="soft")
    expected = computed("silu", d_h, gate, up, mask)
    both = torch.full((11, 80), NAN, device=DEVICE)
    both[:, 3:36], both[:, 40:73] = gate, up
    halves = both[:, 3:36], both[:, 40:73]
    spread = torch.stack([mask, mask - 9], 1)[:, 0]
    assert all(map(torch.equal, computed("silu", d_h, *halves, spread), expected))
    columns = [tensor.t().contiguous().t() for tensor in (d_h, gate, up)]
    assert all(map(torch.equal, computed("silu", *columns, mask), expected))
    d_both = torch.full((11, 80), 7.0, device=DEVICE)
    backend.gated_backward("silu", d_h, *halves, d_both[:, 3:36], d_both[:, 40:73], mask)
    assert torch.equal(d_both[:, 3:36], expected[1]) and torch.equal(d_both[:, 40:73], expected[2])
    assert (d_both[:, :3] == 7).all() and (d_both[:, 36:40] == 7).all() and (d_both[:, 73:] == 7).all()
    hard = mask > 0.4
    repeated = torch.stack([hard, ~hard], 1)[:, 0]
    assert torch.equal(backend.gated("silu", gate, up, repeated), backend.gated("silu", gate, up, hard))
    same = hard[:1].expand(33)
    assert torch.equal(backend.gated("silu", gate, up, same), backend.gated("silu", gate, up, same.contiguous()))


@pytest.mark.parametrize("kind", [None, "soft"])
def test_nothing_is_read_outside_the_operands_or_before_it_is_written(kind):
    def fenced(tensor):
        """The same values with NaN before and after every row, and in rows around them."""
        buffer = torch.full((tensor.shape[0] + 8, tensor.shape[1] + 40), NAN, device=DEVICE)
        return buffer[4:-4, 20:-20].copy_(tensor)

    d_h, gate, up, mask = problem(7, 19, mask=kind)
    expected = computed("silu", d_h, gate, up, mask)
    if mask is not None:
        mask = fenced(mask.unsqueeze(0))[0]
    with new_memory_is_nan():
        got = computed("silu", *map(fenced, (d_h, gate, up)), mask)
    assert all(map(torch.equal, got, expected)) and all(value.isfinite().all() for value in got)


def test_rows_beyond_two_to_the_31_elements():
    d_h, gate, up, mask = problem(3, 20, torch.float16, "soft")
    expected = computed("silu", d_h, gate, up, mask)
    step = 2**30 + 7
    pages = torch.empty(3 * step, dtype=torch.float16, device=DEVICE)  # pages are taken when they are used
    far = [pages.as_strided((3, 20), (step, 1), start) for start in (0, 64, 128, 192, 256)]
    for tensor, values in zip(far, (d_h, gate, up), strict=False):
        tensor.copy_(values)
    assert torch.equal(backend.gated("silu", far[1], far[2], mask), expected[0])
    d_mask = backend.gated_backward("silu", *far, mask, True)
    assert all(map(torch.equal, (far[3], far[4], d_mask), expected[1:]))
