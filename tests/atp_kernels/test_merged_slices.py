"""Bool masks on the sum of a base and a constant adapter that became part of it: masks on a base, which is sliced."""

import pytest
import torch
from linear_cases import Shape, operands

from atp_kernels import explain, extension, masked_lora_linear
from atp_kernels.linear import definition, op, ways

pytestmark = pytest.mark.skipif(not extension.AVAILABLE, reason=str(extension.REASON))
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
    for how, y, given in (
        ("exact", definition.masked_lora_linear(**exact, scaling=SCALING, mask_lora=True), exact),
        ("sliced", summed(tensors), tensors),
        ("whole", summed(tensors, backend="native"), tensors),
    ):
        gradient = torch.autograd.grad(y, given["x"], upstream.to(y.dtype)) if x_learns else ()
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
