"""The blocks as autograd, autocast and torch.compile see them, and their errors."""

import pytest
import torch
from block_cases import EQUAL, MLP, QKV, Case, assert_as_good_as, mlp, mlp_case, slices_of
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint

import atp_kernels
from atp_kernels import KeptFirst, KeptSlice, Projection, masked_lora_qkv, masked_lora_swiglu

FORMS = [(None, False), ("soft", True), ("soft", False), ("hard", False)]
# (backend of the eager call, tolerances of values, of gradients of order 1000). Compiled code keeps ATen's
# activation in every backend, and eager native has its own.
EAGER = [("reference", {}, {}), ("auto", {"rtol": 1e-5, "atol": 1e-4}, {"rtol": 1e-5, "atol": 2e-2})]


def attention(case, **options):
    return masked_lora_qkv(case.x, *case.linears(EQUAL), masks=tuple(case.masks), **options)


@pytest.mark.parametrize(("backend", "rounding", "gradient_rounding"), EAGER)
@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize(("mask", "mask_lora"), [("soft", True), ("hard", False)])
def test_compile_whole_graph(mask, mask_lora, dynamic, backend, rounding, gradient_rounding):
    torch._dynamo.reset()
    options = {"mask_lora": mask_lora, "backend": backend}

    def block(x, mlp_linears, qkv_linears, mlp_mask, qkv_masks):
        y = masked_lora_swiglu(x, *mlp_linears, mask=mlp_mask, **options)
        return torch.cat(masked_lora_qkv(y, *qkv_linears, masks=qkv_masks, **options), -1)

    compiled = torch.compile(block, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for tokens in (5, 9):
        one, other = mlp_case(mask, rows=(2, tokens)), Case(QKV, mask=mask, seed=1)
        arguments = (one.x, one.linears(), other.linears(), one.masks[0], tuple(other.masks))
        leaves = [t for t in (*one.leaves.values(), *list(other.leaves.values())[1:]) if t.requires_grad]
        expected, got = block(*arguments), compiled(*arguments)
        assert_close(got, expected, **rounding)
        grads = [torch.autograd.grad(y.square().sum(), leaves) for y in (got, expected)]
        assert_close(*grads, **gradient_rounding)


@pytest.mark.parametrize(("backend", "rounding", "gradient_rounding"), EAGER)
@pytest.mark.parametrize("dynamic", [False, True])
def test_compile_on_kept_slices(dynamic, backend, rounding, gradient_rounding):
    torch._dynamo.reset()
    case = mlp_case("hard", frozen=True)
    kept = slices_of(case, True)
    for slice_ in kept:
        slice_.weight(torch.float32)

    def block(x):
        return masked_lora_swiglu(x, *case.linears(), kept=kept, backend=backend)

    compiled = torch.compile(block, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    leaves = [tensor for tensor in case.leaves.values() if tensor.requires_grad][1:]
    for rows in (5, 9):
        x = torch.randn(rows, 12).requires_grad_()
        values = [call(x) for call in (compiled, block)]
        assert_close(*values, **rounding)
        grads = [torch.autograd.grad(y.square().sum(), [x, *leaves]) for y in values]
        assert_close(*grads, **gradient_rounding)


@pytest.mark.parametrize(("mask", "mask_lora"), FORMS)
def test_autocast_casts_everything_but_masks(mask, mask_lora):
    for case, call in ((mlp_case(mask, frozen=True), mlp), (Case(QKV, mask=mask, frozen=True), attention)):
        with torch.autocast("cpu", torch.bfloat16):
            got = call(case, mask_lora=mask_lora)
        low = case.upcast()
        for name, tensor in low.leaves.items():
            dtype = torch.float32 if "mask" in name else torch.bfloat16
            low.leaves[name] = tensor.detach().to(dtype).requires_grad_(tensor.requires_grad)
        low.masks = [low.leaves.get(f"mask {i}", mask) for i, mask in enumerate(case.masks)]
        expected = call(low, mask_lora=mask_lora)
        assert_close(got, expected)
        sum(value.float().sum() for value in (got if isinstance(got, tuple) else [got])).backward()
        assert all(leaf.grad.dtype == torch.float32 for leaf in case.leaves.values() if leaf.requires_grad)


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize(("mask", "mask_lora"), FORMS)
def test_gradient_checkpointing_and_a_second_backward(mask, mask_lora, use_reentrant):
    case = mlp_case(mask)
    leaves = list(case.leaves.values())
    y = mlp(case, mask_lora=mask_lora)
    first = torch.autograd.grad(y.square().sum(), leaves, retain_graph=True)
    second = torch.autograd.grad(y.square().sum(), leaves)
    again = checkpoint(lambda x: mlp(case, mask_lora=mask_lora), case.x, use_reentrant=use_reentrant)
    again.square().sum().backward()
    for leaf, *grads in zip(leaves, first, second, strict=True):
        assert torch.equal(grads[0], grads[1]) and torch.equal(grads[0], leaf.grad)


def test_checkpointing_on_slices():
    case = mlp_case("hard", frozen=True)
    kept = slices_of(case, True)
    leaves = [leaf for leaf in case.leaves.values() if leaf.requires_grad]

    def block(x):
        return masked_lora_swiglu(x, *case.linears(), kept=kept)

    plain = torch.autograd.grad(block(block(case.x)).square().sum(), leaves)
    checkpoint(lambda x: block(block(x)), case.x, use_reentrant=False).square().sum().backward()
    assert all(torch.equal(leaf.grad, grad) for leaf, grad in zip(leaves, plain, strict=True))


@pytest.mark.parametrize(("mask", "mask_lora"), FORMS)
def test_each_gradient_alone(mask, mask_lora):
    case = mlp_case(mask)
    together = case.results(mlp(case, mask_lora=mask_lora))
    for name in case.leaves:
        alone = case.upcast()
        alone.leaves = {n: t.detach().requires_grad_(n == name) for n, t in case.leaves.items()}
        alone.masks = [alone.leaves.get("mask 0", case.masks[0])]
        got = alone.results(mlp(alone, mask_lora=mask_lora))
        assert torch.equal(got[f"d {name}"], together[f"d {name}"]), name


@pytest.mark.parametrize(("mask", "mask_lora"), FORMS)
def test_uninitialised_memory_is_never_read_and_results_repeat(mask, mask_lora):
    case = mlp_case(mask, frozen=True)
    expected = case.results(mlp(case, mask_lora=mask_lora))
    torch.use_deterministic_algorithms(True)  # fills new memory with NaN
    try:
        runs = [case.results(mlp(case, mask_lora=mask_lora)) for _ in range(10)]
    finally:
        torch.use_deterministic_algorithms(False)
    for run in runs:
        assert all(torch.equal(value, expected[name]) for name, value in run.items())


def test_non_contiguous_operands():
    case = mlp_case("soft")
    strided = case.upcast()
    for name, tensor in case.leaves.items():
        strided.leaves[name] = torch.stack([tensor.detach()] * 2, -1)[..., 0].requires_grad_()
    strided.masks = [strided.leaves["mask 0"]]
    got = strided.results(mlp(strided, mask_lora=True))
    assert_as_good_as(lambda one: mlp(one, mask_lora=True), got, case)


def test_no_gradient_where_none_is_wanted():
    case = mlp_case("soft")
    with torch.no_grad():
        assert not mlp(case, mask_lora=True).requires_grad
    case.freeze("weight", "bias", "lora_a", "lora_b", "x", "0")
    assert not mlp(case).requires_grad


def test_double_backward_is_refused():
    case = mlp_case()
    (grad,) = torch.autograd.grad(mlp(case).square().sum(), case.x, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiate twice|once_differentiable"):
        grad.sum().backward()


@pytest.mark.parametrize("op", ["masked_lora_swiglu", "masked_lora_qkv"])
def test_explain(op):
    missing = atp_kernels.available_backends()["native"]
    runs = "native (first choice on cpu)" if missing is None else f"reference (native: {missing})"
    assert atp_kernels.explain(op, torch.ones(1)) == f"{op} on cpu in float32 runs on {runs}."


def linear(n, k, r=2):
    return Projection(torch.ones(n, k), torch.ones(r, k), torch.ones(n, r), 1.0)


MASK = torch.arange(20) % 3 > 0
PAIR = [KeptSlice(torch.ones(n, k)) for n, k in MLP]
APART = [KeptSlice(torch.ones(20, 12), out_mask=KeptFirst(MASK)) for _ in range(2)]
WRONG = [
    ({"activation": "relu"}, "activation is 'relu': use one of silu, gelu_tanh"),
    ({"up": linear(19, 12)}, r"gate \[20, 12\] and up \[19, 12\] need weights of one shape"),
    ({"down": linear(12, 19)}, r"x has shape \[5, 20\], but weight \[12, 19\]"),
    ({"mask": MASK[:19]}, r"out_mask has shape \[19\]"),
    ({"kept": tuple(PAIR), "mask": MASK}, "kept slices bring their own masks"),
    ({"kept": tuple(PAIR), "mask_lora": True}, "kept slices bring their own masks"),
    ({"kept": (*APART, PAIR[2])}, "must share one mask or KeptFirst"),
    ({"kept": (PAIR[0], PAIR[1], PAIR[0])}, r"x has shape \[5, 20\], but the weight \[20, 12\]"),
]


@pytest.mark.parametrize(("changed", "message"), WRONG)
def test_a_wrong_block_is_one_clear_sentence(changed, message):
    given = dict(zip(("gate", "up", "down"), (linear(*shape) for shape in MLP), strict=True))
    with pytest.raises(ValueError, match=message):
        masked_lora_swiglu(torch.ones(5, 12), **{**given, **changed})
