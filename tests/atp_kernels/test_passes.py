"""What holds for every operation, over its passes: bits that repeat, autograd, checkpoints, autocast and compilers."""

from dataclasses import replace

import pytest
import torch
from backends_here import DEVICE, ON_GPU, backends, new_memory_is_nan
from operation_cases import CASES, M
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint

CALLS = [
    pytest.param(case, backend, id=f"{name}-{backend}") for name, case in CASES.items() for backend in backends(case.op)
]
WITH_GRADIENTS = [call for call in CALLS if not call.values[0].written and call.values[0].op != "compact"]
QUICK = [call for call in WITH_GRADIENTS if ON_GPU or call.values[1] != "triton"]  # not in Triton's interpreter
# Where autograd adds gradients of one input up, it does so in the dtype before the cast: not so of q, k and v apart.
CAST = [name for name in CASES if name.startswith(("linear", "swiglu", "qkv-", "kept")) and name != "linear-merged"]
COMPILED = (
    "linear-hard", "linear-dropout", "swiglu-sum", "qkv", "rms_norm-narrow", "rotary_embedding", "cross_entropy_",
    "compact",
)  # fmt: skip


def results(case, operands=None, backend="reference"):
    def upstream(result):
        return torch.randn(result.shape, generator=torch.Generator().manual_seed(7)).to(result)

    return case.run(operands or case.operands(torch.float32), backend, upstream)


def assert_same(got, expected):
    assert got.keys() == expected.keys()
    for name, value in got.items():
        assert torch.equal(value, expected[name]), name


@pytest.mark.parametrize(("case", "backend"), CALLS)
def test_bits_repeat_and_no_memory_is_read_before_it_is_written(case, backend):
    expected = results(case, backend=backend)
    with new_memory_is_nan():
        assert_same(results(case, backend=backend), expected)


@pytest.mark.parametrize(("case", "backend"), WITH_GRADIENTS)
def test_a_second_backward_pass_and_checkpoints_give_the_same_gradients(case, backend):
    operands = case.operands(torch.float32)
    leaves = [operands[name].requires_grad_() for name in case.leaves(operands)]

    def total(*_):
        return sum(y.square().sum() for y in case.call(operands, backend))

    options = {"allow_unused": True, "materialize_grads": True}
    value = total()
    expected = torch.autograd.grad(value, leaves, retain_graph=True, **options)
    assert all(map(torch.equal, torch.autograd.grad(value, leaves, **options), expected))
    for use_reentrant in (False, True):
        for leaf in leaves:
            leaf.grad = torch.zeros_like(leaf)
        checkpoint(total, leaves[0], use_reentrant=use_reentrant, preserve_rng_state=False).backward()
        assert all(torch.equal(leaf.grad, grad) for leaf, grad in zip(leaves, expected, strict=True))


@pytest.mark.parametrize(("case", "backend"), QUICK)
def test_each_gradient_alone(case, backend):
    together = results(case, backend=backend)
    for name in (key.removeprefix("d ") for key in together if key.startswith("d ")):
        alone = results(replace(case, frozen=tuple(case.shapes.keys() - {name})), backend=backend)
        assert {key for key in alone if key.startswith("d ")} == {f"d {name}"}
        assert_close(alone[f"d {name}"], together[f"d {name}"], msg=name)


@pytest.mark.parametrize("name", CAST)
def test_autocast_casts_all_but_masks(name):
    case = CASES[name]

    def cast(operands, backend):
        with torch.autocast(DEVICE, torch.bfloat16):
            return case.call(operands, backend)

    operands = case.operands(torch.float32)
    low = {name: t if "hard" in name or "soft" in name else t.bfloat16() for name, t in operands.items()}
    expected = results(case, low)
    for key, value in results(replace(case, call=cast), operands).items():
        assert value.dtype == (torch.float32 if key.startswith("d ") else expected[key].dtype), key
        assert torch.equal(value.to(expected[key].dtype), expected[key]), key


@pytest.mark.parametrize("name", COMPILED)
def test_compiles_whole(name):
    torch._dynamo.reset()
    case = CASES[name]
    compiled = torch.compile(case.call, fullgraph=True, backend="aot_eager")
    for rows in (M, M + 5, M + 9):  # the second size makes the shapes dynamic
        sized = case.sized({M: rows})
        expected = results(sized)
        for key, value in results(replace(sized, call=compiled)).items():
            assert_close(value, expected[key], msg=key)
