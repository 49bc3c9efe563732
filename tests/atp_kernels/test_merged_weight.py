"""Constant adapters that become part of the weight where autocast casts it, or of the slice that bool masks keep."""

import pytest
import torch
from block_cases import Case
from hypothesis import given, settings
from hypothesis import strategies as st
from linear_cases import Shape, frozen, operands, unfused

from atp_kernels import explain, extension, masked_lora_linear, masked_lora_swiglu
from atp_kernels.linear import definition, native, op, ways

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


def constants(shape, seed=0):
    """Operands in float32 whose weight, factors and bias are constant."""
    return frozen(operands(shape, torch.float32, seed), "lora_a", "lora_b")


def autocast():
    return torch.autocast("cpu", torch.bfloat16)


def gradients(y, tensors):
    """dy for a fixed upstream gradient, of all that requires one."""
    upstream = torch.randn(y.shape, generator=torch.Generator().manual_seed(4)).to(y.dtype)
    leaves = [tensor for tensor in tensors.values() if tensor.requires_grad]
    return torch.autograd.grad(y, leaves, upstream)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_error_is_no_worse_than_that_of_two_paths(shape, merges):
    tensors = constants(shape)
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


@pytest.mark.parametrize(("mask", "mask_lora"), [("soft", True), (None, False), ("soft", False)])
def test_gated_mlp(mask, mask_lora, merges):
    """Adapters that lie beside the masks are not merged."""
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
    merged = mask is None or mask_lora
    assert (merges.count((64, 40)), merges.count((40, 64))) == ((3, 2) if merged else (0, 0))


def test_only_where_nothing_else_could_be_meant(merges):
    soft, plain = SHAPES[0], SHAPES[4]

    def count(shape=soft, change=None, cast=True, **options):
        tensors = constants(shape)
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
    tensors = constants(SHAPES[0])

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


def test_wrong_input_is_one_sentence():
    call = torch.ops.atp_kernels_native.merged_weight
    with pytest.raises(RuntimeError, match="weight must be a contiguous float32 matrix"):
        call(torch.ones(3, 4).double(), torch.ones(2, 4), torch.ones(3, 2), 1.0)
    with pytest.raises(RuntimeError, match=r"lora_a must be a contiguous float32 matrix \[2, 4\]"):
        call(torch.ones(3, 4), torch.ones(2, 5), torch.ones(3, 2), 1.0)
    with pytest.raises(RuntimeError, match=r"lora_b must be a contiguous float32 matrix \[3, 2\]"):
        call(torch.ones(3, 4), torch.ones(2, 4), torch.ones(2, 2), 1.0)


# Bool masks on the sum become masks on the merged weight, which is sliced

SCALING = 1.7


@pytest.fixture
def calls(monkeypatch):
    """The ways that calls go, where slicing always pays."""
    for name, value in (("FEWEST_ROWS", 1), ("LARGEST_SHARE", 1.0), ("LEAST_SAVED", 0)):
        monkeypatch.setattr(ways, name, value)
    names, real = [], op.linear_by

    def noting(way, *rest):
        names.append(way.name)
        return real(way, *rest)

    monkeypatch.setattr(op, "linear_by", noting)
    return names


def constant(out_mask, in_mask, *, bias=False, x_learns=True):
    shape = Shape(m=40, n=44, k=52, out_mask=out_mask, in_mask=in_mask, mask_lora=True, bias=bias, dropout=False)
    tensors = operands(shape, torch.float32)
    for name, tensor in tensors.items():
        tensor.requires_grad_(x_learns and name == "x")
    return tensors


def summed(tensors, *, autocast=True, **options):
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        return masked_lora_linear(**tensors, scaling=SCALING, mask_lora=True, **options)


@pytest.mark.parametrize("x_learns", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("out_mask", "in_mask"), [("hard", None), (None, "hard"), ("hard", "hard"), ("hard", "empty")])
def test_they_are_sliced_and_no_worse_than_whole_products(calls, out_mask, in_mask, bias, x_learns):
    tensors = constant(out_mask, in_mask, bias=bias, x_learns=x_learns)
    exact = {name: tensor if "mask" in name else tensor.detach().double() for name, tensor in tensors.items()}
    exact["x"].requires_grad_(x_learns)
    upstream = torch.randn(40, 44, generator=torch.Generator().manual_seed(1))
    results = {}
    for how, y, taken in (
        ("exact", definition.masked_lora_linear(**exact, scaling=SCALING, mask_lora=True), exact),
        ("sliced", summed(tensors), tensors),
        ("whole", summed(tensors, backend="native"), tensors),
    ):
        gradient = torch.autograd.grad(y, taken["x"], upstream.to(y.dtype)) if x_learns else ()
        results[how] = [each.double() for each in (y, *gradient)]
    assert calls == ["sliced"]
    for sliced, whole, true in zip(results["sliced"], results["whole"], results["exact"], strict=True):
        assert (sliced - true).norm() <= 1.25 * (whole - true).norm()


@pytest.mark.parametrize("change", ["soft", "learns", "float32", "apart"])
def test_others_are_not(calls, change):
    tensors = constant("soft" if change == "soft" else "hard", None)
    tensors["lora_b"].requires_grad_(change == "learns")
    options = {"lora_input": torch.randn(40, 52)} if change == "apart" else {}
    y = summed(tensors, autocast=change != "float32", **options)
    low = {name: tensor.detach().double() for name, tensor in (tensors | options).items() if name != "out_mask"}
    exact = definition.masked_lora_linear(**low, out_mask=tensors["out_mask"], scaling=SCALING, mask_lora=True)
    assert calls == [] and (y - exact).norm() < 0.02 * exact.norm()


@pytest.mark.parametrize("autocast", [True, False])
def test_explain_knows(calls, autocast):
    """Without autocast the adapter stays apart."""
    tensors = constant("hard", None)
    given = [tensors.pop(name) for name in ("x", "weight", "lora_a", "lora_b")]
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        said = explain("masked_lora_linear", *given, **tensors, mask_lora=True)
    assert ("runs on sliced" in said) == autocast
