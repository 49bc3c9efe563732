"""Constant adapters that become part of the weight where autocast casts it: when, and with what error."""

import pytest
import torch
from block_cases import Case
from hypothesis import given, settings
from hypothesis import strategies as st
from linear_cases import Shape, operands, unfused
from repeats import assert_repeats

from atp_kernels import extension, masked_lora_linear, masked_lora_swiglu
from atp_kernels.linear import native

pytestmark = pytest.mark.skipif(not extension.AVAILABLE, reason=str(extension.REASON))

SHAPES = [
    Shape(out_mask=out_mask, in_mask=in_mask, mask_lora=mask_lora, bias=bias, dropout=False, m=40, n=44, k=52)
    for out_mask, in_mask, mask_lora in (("soft", None, True), ("hard", "soft", True), (None, None, False))
    for bias in (False, True)
]


@pytest.fixture
def merges(monkeypatch):
    """The shapes of the weights that adapters were merged into."""
    shapes, real = [], native.merged_weight

    def noting(weight, *rest):
        shapes.append(tuple(weight.shape))
        return real(weight, *rest)

    monkeypatch.setattr(native, "merged_weight", noting)
    return shapes


def frozen(shape, seed=0):
    """Operands in float32 whose weight, factors and bias are constant."""
    tensors = operands(shape, torch.float32, seed)
    for name in ("weight", "lora_a", "lora_b", "bias"):
        if name in tensors:
            tensors[name].requires_grad_(False)
    return tensors


def autocast():
    return torch.autocast("cpu", torch.bfloat16)


def gradients(y, tensors):
    """dy for a fixed upstream gradient, of all that requires one."""
    upstream = torch.randn(y.shape, generator=torch.Generator().manual_seed(4)).to(y.dtype)
    leaves = [tensor for tensor in tensors.values() if tensor.requires_grad]
    return torch.autograd.grad(y, leaves, upstream)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_error_is_no_worse_than_that_of_two_paths(shape, merges):
    tensors = frozen(shape)
    true = {name: tensor.detach().double().requires_grad_(tensor.requires_grad) for name, tensor in tensors.items()}
    exact = unfused(shape, true)[0]
    exact = [exact, *gradients(exact, true)]
    with autocast():
        ours = masked_lora_linear(**tensors, **shape.options)
        assert merges == [(44, 52)]
        low = {name: tensor if "mask" in name else tensor.bfloat16() for name, tensor in tensors.items()}
        two_paths = masked_lora_linear(**low, **shape.options, backend="reference")
    assert merges == [(44, 52)] and ours.dtype == torch.bfloat16
    ours, two_paths = ([y, *gradients(y, tensors)] for y in (ours, two_paths))
    for mine, other, truth in zip(ours, two_paths, exact, strict=True):
        mine, other = ((value.double() - truth).norm() for value in (mine, other))
        assert mine <= 1.25 * other


@pytest.mark.parametrize(("mask", "mask_lora"), [("soft", True), (None, False)])
def test_gated_mlp(mask, mask_lora, merges):
    case = Case(((64, 40), (64, 40), (40, 64)), rows=(30,), rank=4, mask=mask, frozen=True)
    for name, leaf in case.leaves.items():
        leaf.requires_grad_(name == "x" or "mask" in name)
    low = case.upcast()
    options, scalings = {"mask_lora": mask_lora}, (1.7, 1.7, 1.3)
    exact = masked_lora_swiglu(low.x, *low.linears(scalings), mask=low.masks[0], **options)
    results = {}
    for trained in (False, True):
        case.leaves["0 lora_a"].requires_grad_(trained)
        with autocast():
            y = masked_lora_swiglu(case.x, *case.linears(scalings), mask=case.masks[0], **options)
        results[trained] = float((y.double() - exact).norm())
    assert results[False] <= 1.25 * results[True]
    assert (merges.count((64, 40)), merges.count((40, 64))) == (3, 2)


def test_gated_mlp_whose_adapters_lie_beside_its_masks_is_not_merged(merges):
    case = Case(((64, 40), (64, 40), (40, 64)), rows=(30,), rank=4, mask="soft", frozen=True)
    for name, leaf in case.leaves.items():
        leaf.requires_grad_(name == "x" or "mask" in name)
    with autocast():
        masked_lora_swiglu(case.x, *case.linears((1.7, 1.7, 1.3)), mask=case.masks[0], mask_lora=False)
    assert merges == []


def test_only_where_nothing_else_could_be_meant(merges):
    soft, plain = SHAPES[0], SHAPES[4]

    def count(shape=soft, change=None, cast=True, **options):
        tensors = frozen(shape)
        if change:
            change(tensors)
        del merges[:]
        with torch.autocast("cpu", torch.bfloat16, enabled=cast):
            masked_lora_linear(**tensors, **shape.options | options)
        return len(merges)

    assert count() == count(plain) == count(backend="native") == 1
    assert count(cast=False) == 0
    assert count(backend="reference") == 0
    assert count(mask_lora=False) == 0
    assert count(plain, dropout=0.5, seed=1) == 0
    for name in ("weight", "lora_a", "lora_b"):
        assert count(change=lambda tensors, name=name: tensors[name].requires_grad_()) == 0
        with torch.no_grad():
            assert count(change=lambda tensors, name=name: tensors[name].requires_grad_()) == 1
    assert count(change=lambda tensors: tensors.update(lora_input=tensors["x"] * 2)) == 0
    assert count(change=lambda tensors: tensors.update(weight=tensors["weight"].bfloat16())) == 0


def test_a_compiler_fuses_casts_by_itself(merges):
    tensors = frozen(SHAPES[0])

    def call(x):
        with autocast():
            return masked_lora_linear(**tensors | {"x": x}, **SHAPES[0].options)

    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(tensors["x"]), call(tensors["x"]), atol=0.1, rtol=0.02)
    assert len(merges) == 1


@given(
    rows=st.sampled_from([0, 1, 5, 70]),
    cols=st.sampled_from([1, 7, 8, 9, 31, 32, 33, 300]),
    rank=st.sampled_from([1, 2, 8, 16]),
    apart=st.booleans(),
)
@settings(max_examples=60, derandomize=True, deadline=None)
def test_the_merged_weight_is_rounded_once(rows, cols, rank, apart):
    rng = torch.Generator().manual_seed(rows + cols + rank)
    weight, lora_a, lora_b = (torch.randn(*size, generator=rng) for size in ((rows, cols), (rank, cols), (rows, rank)))
    if apart:
        weight, lora_a, lora_b = (tensor.t().contiguous().t() for tensor in (weight, lora_a, lora_b))
    merged = native.merged_weight(weight, lora_a, lora_b, 0.7)
    exact = weight.double() + 0.7 * (lora_b.double() @ lora_a.double())
    size = weight.double().abs() + 0.7 * (lora_b.double().abs() @ lora_a.double().abs())
    allowed = torch.finfo(torch.bfloat16).eps / 2 * exact.abs() + (rank + 2) * torch.finfo(torch.float32).eps * size
    assert merged.dtype == torch.bfloat16 and ((merged.double() - exact).abs() <= allowed).all()


def test_rounding_is_that_of_the_cast_at_ties_and_for_every_nan():
    bits = torch.tensor([0x7FFFFFFF, -1, 0x7F800001, 0x7F800000], dtype=torch.int32)  # three NaNs and infinity
    row = torch.cat([torch.tensor([257.0, 259.0, -257.0, 1.0]), bits.view(torch.float32)]).repeat(6)[:45]
    merged = native.merged_weight(row[None], torch.zeros(2, 45), torch.zeros(1, 2), 1.0)
    torch.testing.assert_close(merged, row[None].bfloat16(), rtol=0, atol=0, equal_nan=True)
    assert torch.equal(merged[0, :3].float(), torch.tensor([256.0, 260.0, -256.0]))


def large_problem():
    rng = torch.Generator().manual_seed(3)
    return tuple(torch.randn(*size, generator=rng) for size in ((700, 1003), (8, 1003), (700, 8)))


def test_bits_do_not_depend_on_the_run_or_the_threads():
    operands = large_problem()
    assert_repeats(lambda: [native.merged_weight(*operands, 0.7)])


def test_wrong_input_is_one_sentence():
    call = torch.ops.atp_kernels_native.merged_weight
    with pytest.raises(RuntimeError, match="weight must be a contiguous float32 matrix"):
        call(torch.ones(3, 4).double(), torch.ones(2, 4), torch.ones(3, 2), 1.0)
    with pytest.raises(RuntimeError, match=r"lora_a must be a contiguous float32 matrix \[2, 4\]"):
        call(torch.ones(3, 4), torch.ones(2, 5), torch.ones(3, 2), 1.0)
    with pytest.raises(RuntimeError, match=r"lora_b must be a contiguous float32 matrix \[3, 2\]"):
        call(torch.ones(3, 4), torch.ones(2, 4), torch.ones(2, 2), 1.0)
