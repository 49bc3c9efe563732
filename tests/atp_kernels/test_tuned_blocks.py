"""What a tuned table says for linears of one input, for those of an MLP, and for slices that lie kept first."""

import pytest
import torch
from linear_cases import Shape
from linear_cases import operands as random_operands
from tables_here import tables_in, without_extension
from torch.testing import assert_close

import atp_kernels
from atp_kernels import (
    KeptFirst,
    KeptSlice,
    Projection,
    checks,
    extension,
    kept_lora_linear,
    masked_lora_qkv,
    masked_lora_swiglu,
    triton_runtime,
)
from atp_kernels.kept import aten, native
from atp_kernels.kept.forms import taken
from atp_kernels.linear import definition
from atp_kernels.linear import native as native_linear
from atp_kernels.linear import triton as triton_linear
from atp_kernels.tuning import table
from atp_kernels.tuning.table import Entry, Key

CPU = torch.device("cpu")
M, HIDDEN, INNER, R = 12, 64, 96, 4
interpreted = pytest.mark.skipif(not triton_runtime.INTERPRETED, reason="runs Triton's kernels in its interpreter")
built = pytest.mark.skipif(not extension.AVAILABLE, reason=str(extension.REASON))


@pytest.fixture
def tuned(tmp_path):
    """Writes entries (regime, way, tile, n, k), which hold for every share of the weight from 0.3 to 1."""
    with tables_in(tmp_path) as path:

        def write(*entries, kept=0.6, dtype="float32"):
            found = [
                Entry(Key(regime, dtype, M, n, k, R, kept if regime in table.HARD else 1.0), way, tile, {way: 1.0})
                for regime, way, tile, n, k in entries
            ]
            table.write(path, CPU, found)
            return path

        yield write


@pytest.fixture
def vendor():
    with without_extension():
        yield


@pytest.fixture
def calls(monkeypatch):
    """Notes which backend's forward passes ran."""
    noted = []
    for module in (aten, native, native_linear, triton_linear):
        original = module.forward

        def noting(*arguments, _name=module.__name__, _original=original, **options):
            noted.append((_name.removeprefix("atp_kernels."), options.get("config")))
            return _original(*arguments, **options)

        monkeypatch.setattr(module, "forward", noting)
    return noted


def projections(*shapes):
    rng = torch.Generator().manual_seed(0)
    randn = lambda *size: torch.randn(size, generator=rng)  # noqa: E731
    return [
        Projection(randn(n, k) / k**0.5, randn(R, k).requires_grad_(), randn(n, R).requires_grad_(), 0.1)
        for n, k in shapes
    ]


def shared(linears, kept=None):
    """The name of the Function of q, k and v, after their results were compared with the definition's."""
    x = torch.randn(M, HIDDEN, generator=torch.Generator().manual_seed(1)).requires_grad_()
    values = masked_lora_qkv(x, *linears, kept=kept)
    exact = tuple(definition.masked_lora_linear(x, *linear[:3], scaling=0.1) for linear in linears)
    if kept is None:
        assert_close(values, exact, rtol=1e-4, atol=1e-4)
    return values[0].grad_fn.name()


@pytest.mark.parametrize(("ways", "function"), [
    (("reference", "reference"), "SharedLinearsBackward"),
    (("folded", "reference"), "FoldedLoraLinearBackward"),
    (("reference", "folded"), "LoraLinearBackward"),  # that of q, which is taken apart from k and v
])  # fmt: skip
def test_linears_of_one_input_part_only_for_another_way(tuned, vendor, ways, function):
    linears = projections((INNER, HIDDEN), (32, HIDDEN), (32, HIDDEN))
    assert shared(linears) == "SharedLinearsBackward"
    tuned(("cut", ways[0], None, INNER, HIDDEN), ("cut", ways[1], None, 32, HIDDEN))
    assert shared(linears) == function


@interpreted
def test_slices_kept_first_part_for_a_tile_alone(tuned, vendor):
    order = KeptFirst(torch.arange(INNER) < 64)
    linears = projections(*[(INNER, HIDDEN)] * 3)
    kept = tuple(KeptSlice(linear.weight, out_mask=order) for linear in linears)
    tuned(("first_out", "reference", None, INNER, HIDDEN))
    assert shared(linears, kept) == "SharedLinearsBackward"
    tuned(("first_out", "triton", "64x64x32", INNER, HIDDEN))
    assert shared(linears, kept) == "KeptLoraLinearBackward"


def mlp(kept=False, mask=None, **options):
    """Value and gradients of an MLP, compared with those of another that asks no table."""
    linears = projections((INNER, HIDDEN), (INNER, HIDDEN), (HIDDEN, INNER))
    x = torch.randn(M, HIDDEN, generator=torch.Generator().manual_seed(1)).requires_grad_()
    if kept:
        order = KeptFirst(torch.arange(INNER) % 3 > 0)
        sides = ({"out_mask": order}, {"out_mask": order}, {"in_mask": order})
        options["kept"] = tuple(KeptSlice(linear.weight, **side) for linear, side in zip(linears, sides, strict=True))
    else:
        options["mask"] = mask
    y = masked_lora_swiglu(x, *linears, **options)
    wanted = [x, *(factor for linear in linears for factor in (linear.lora_a, linear.lora_b))]
    return y, *torch.autograd.grad(y.square().mean(), wanted)  # a sum's are in the thousands: no atol would fit


@built
@interpreted
def test_each_linear_of_an_mlp_takes_the_backend_and_tile_of_its_entry(tuned, calls):
    expected = mlp()
    assert calls == [("linear.native", None)] * 3
    calls.clear()
    tuned(("cut", "triton", (64, 64, 32, 4, 3), INNER, HIDDEN), ("cut", "triton", None, HIDDEN, INNER))
    assert_close(mlp(), expected, rtol=1e-4, atol=1e-5)
    assert [name for name, _ in calls] == ["linear.triton"] * 3
    assert [config and (config.block_m, config.num_warps) for _, config in calls] == [(64, 4), (64, 4), None]
    calls.clear()
    assert_close(mlp(backend="native"), expected, rtol=1e-4, atol=1e-5)
    assert calls == [("linear.native", None)] * 3


@built
def test_an_mlp_stays_one_block_where_the_table_folds(tuned, calls):
    tuned(("cut", "folded", None, INNER, HIDDEN), ("cut", "folded", None, HIDDEN, INNER))
    y, *_ = mlp()
    assert y.grad_fn.name() == "SwigluBackward" and calls == [("linear.native", None)] * 3


@interpreted
def test_linears_that_drop_ask_no_table(tuned, vendor):
    tuned(("cut", "triton", None, INNER, HIDDEN), ("cut", "folded", None, 32, HIDDEN))
    y, *_ = masked_lora_qkv(torch.ones(M, HIDDEN), *projections(*[(32, HIDDEN)] * 3), dropout=0.5, seed=1)
    assert y.grad_fn.name() == "SharedLinearsBackward"
    y, *_ = mlp(dropout=0.5, seeds=(1, 2))
    assert y.grad_fn.spec.shared and not mlp()[0].grad_fn.spec.shared


@built
@interpreted
def test_an_mlp_with_a_mask_takes_the_tile_of_search(tuned, calls):
    mask = torch.arange(INNER) % 3 > 0
    expected = mlp(mask=mask)
    calls.clear()
    tuned(("search", "triton", (64, 64, 32, 4, 3), INNER, HIDDEN))
    assert_close(mlp(mask=mask), expected, rtol=1e-4, atol=1e-5)
    assert [name for name, _ in calls] == ["linear.triton", "linear.triton", "linear.native"]


@interpreted
def test_slices_of_an_mlp_take_the_tiles_of_their_sides(tuned, vendor, calls):
    expected = mlp(kept=True)
    calls.clear()
    tuned(("first_in", "triton", "64x64x32", HIDDEN, INNER))
    y, *grads = mlp(kept=True)
    assert_close((y, *grads), expected, rtol=1e-4, atol=1e-5)
    spec = y.grad_fn.spec
    modules = spec.backends
    assert spec.shared and modules[0] is modules[1] is not modules[2]
    assert modules[2].forward.keywords["config"].block_k == 32
    tuned(("first_out", "triton", "64x64x32", INNER, HIDDEN))
    y, *grads = mlp(kept=True)
    assert_close((y, *grads), expected, rtol=1e-4, atol=1e-5)
    assert not y.grad_fn.spec.shared


@built
@pytest.mark.parametrize("side", ["out_mask", "in_mask"])
def test_a_slice_kept_first_takes_the_backend_of_its_side_for_half_to_twice_its_share(tuned, calls, side):
    shape = Shape(m=M, n=INNER, k=HIDDEN, rank=R, out_mask=None, in_mask=None)
    tensors = random_operands(shape, torch.float32)
    size = INNER if side == "out_mask" else HIDDEN
    regime = table.FIRST[side == "in_mask"]
    path = tuned((regime, "reference", None, INNER, HIDDEN), kept=0.25)
    for count, backend in (
        (size // 16, "kept.native"),
        (size // 8, "kept.aten"),
        (size // 2, "kept.aten"),
        (size * 3 // 4, "kept.native"),
    ):
        kept = KeptSlice(tensors["weight"].detach(), **{side: KeptFirst(torch.arange(size) < count, pad_to=1)})
        calls.clear()
        kept_lora_linear(tensors["x"], kept, tensors["lora_a"], tensors["lora_b"], scaling=1.0)
        assert calls[0] == (backend, None), count
        told = atp_kernels.explain("kept_lora_linear", tensors["x"], tensors["lora_a"], tensors["lora_b"], kept=kept)
        assert (f"runs on reference (the fastest for {regime} in {path})" in told) == (backend == "kept.aten")


def test_a_capture_takes_the_whole_weight_only_where_it_was_made_before(tuned, monkeypatch):
    tensors = random_operands(Shape(m=M, n=INNER, k=HIDDEN, rank=R, out_mask=None, in_mask=None), torch.float32)
    tuned(("kept_out", "zeroed", None, INNER, HIDDEN))
    keep = torch.arange(INNER) < 60
    for before in (False, True):
        kept = KeptSlice(tensors["weight"].detach(), out_mask=keep)
        arguments = tensors["x"], kept, tensors["lora_a"], tensors["lora_b"]
        if before:
            kept_lora_linear(*arguments, scaling=1.0)
        with monkeypatch.context() as patch:
            patch.setattr(checks, "is_capturing", lambda device: True)
            assert (taken(kept, tensors["x"], R)[0] is kept) != before
