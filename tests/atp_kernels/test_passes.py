"""What may be asked of every operation: bits that repeat, autograd, autocast, compilers, shapes without data."""

from dataclasses import replace

import pytest
import torch
from backends_here import DEVICE, ON_GPU, backends, new_memory_is_nan
from operation_cases import CASES, K, M
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint

from atp_kernels import KeptSlice, Projection, lora_dropout, masked_lora_qkv, rotary_embedding

CALLS = [
    pytest.param(case, backend, id=f"{name}-{backend}") for name, case in CASES.items() for backend in backends(case.op)
]
WITH_GRADIENTS = [call for call in CALLS if not call.values[0].written and call.values[0].op != "compact"]
QUICK = [call for call in WITH_GRADIENTS if ON_GPU or call.values[1] != "triton"]  # not in Triton's interpreter
# Where autograd adds gradients of one input up, it does so in the dtype before the cast: not so of q, k and v apart.
CAST = [name for name in CASES if name.startswith(("linear", "swiglu", "qkv-", "kept")) and name != "linear-merged"]
COMPILED = (
    "linear-hard", "linear-dropout", "swiglu-sum", "qkv", "rms_norm-narrow", "add_rms_norm-narrow", "rotary_embedding",
    "cross_entropy_",
    "compact", "group_prox_",
)  # fmt: skip


def results(case, operands=None, backend="reference"):
    def upstream(result):
        return torch.randn(result.shape, generator=torch.Generator().manual_seed(7)).to(result)

    return case.run(operands or case.operands(torch.float32), backend, upstream)


@pytest.mark.parametrize(("case", "backend"), CALLS)
def test_bits_repeat_and_no_memory_is_read_before_it_is_written(case, backend):
    expected = results(case, backend=backend)
    with new_memory_is_nan():
        assert_close(results(case, backend=backend), expected, rtol=0, atol=0)


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
        assert_close(results(replace(sized, call=compiled)), expected)


RECORDED = [name for name, case in CASES.items() if not case.written and case.op != "compact"]
LINEAR_IN_X = [name for name in RECORDED if CASES[name].op in ("lora_dropout", "rotary_embedding")]
HOST = ("module", "merged", "first", "last", "kept-dropout", "separate")  # have parts that are made on the host
OF_X = [name for name in RECORDED if "x" in CASES[name].shapes and name not in ("module", "rotary_embedding")]


def first_of(case, backend="auto"):
    """(the first operand, which learns, and the sum of the results)."""
    operands = case.operands(torch.float32)
    x = next(iter(operands.values())).requires_grad_()
    return x, sum(y.sum() for y in case.call(operands, backend))


@pytest.mark.parametrize("name", [name for name in RECORDED if name not in LINEAR_IN_X])
def test_under_a_constant_upstream_gradient_it_is_refused(name):
    x, total = first_of(CASES[name])
    (gradient,) = torch.autograd.grad(total, x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.square().sum().backward()
    again, total = first_of(CASES[name])
    total.backward()
    torch.testing.assert_close(gradient.detach(), again.grad, rtol=0, atol=0)


@pytest.mark.parametrize(
    "operation",
    [
        lambda x: lora_dropout(x, 0.5, 7),
        lambda x: rotary_embedding(*[x.view(1, len(x), 1, 16)] * 2, *[torch.ones(1, len(x), 16)] * 2)[0],
    ],
)
def test_a_derivative_that_depends_on_nothing_is_a_constant(operation):
    x = torch.randn(3, 16, requires_grad=True)
    (gradient,) = torch.autograd.grad(operation(x).sum(), x, create_graph=True)
    assert not gradient.requires_grad and gradient.count_nonzero() > 0


@pytest.mark.parametrize("lead", [(), (3,), (2, 3), (0, 3)], ids=str)
@pytest.mark.parametrize("name", OF_X)
def test_a_result_may_be_changed_in_place(name, lead):
    """As that of `torch.nn.functional.linear`: a residual is added to it, or an activation works on it."""
    case = CASES[name]
    case = replace(
        case, shapes=case.shapes | {x: (*lead, K) for x in ("x", "lora_input", "output") if x in case.shapes}
    )
    (operands, again) = (case.operands(torch.float32) for _ in range(2))
    x, same = (given["x"].requires_grad_() for given in (operands, again))
    changed = case.call(operands, "auto")[0]
    changed.add_(1).mul_(3)
    plain = 3 * (case.call(again, "auto")[0] + 1)
    assert torch.equal(changed, plain)
    changed.square().sum().backward()
    plain.square().sum().backward()
    assert torch.equal(x.grad, same.grad)


@pytest.mark.parametrize("sliced", [False, True])
def test_q_k_and_v_may_be_changed_one_by_one(sliced):
    x, keep = torch.randn(2, 3, 16, requires_grad=True), torch.arange(16) % 3 > 0
    projections = [Projection(torch.randn(16, 16), torch.randn(4, 16), torch.randn(16, 4), 0.5) for _ in range(3)]
    slices = tuple(KeptSlice(one.weight, out_mask=keep) for one in projections) if sliced else None
    q, k, v = masked_lora_qkv(x, *projections, kept=slices)
    kept = k.detach().clone()
    q.mul_(2)
    assert torch.equal(k, kept)
    (q + k + v).sum().backward()
    assert x.grad.count_nonzero() > 0


@pytest.mark.parametrize("name", [name for name in RECORDED if not any(part in name for part in HOST)])
def test_shapes_are_known_without_data(name):
    case = CASES[name]
    operands = case.operands(torch.float32)
    expected = [y.shape for y in case.call(operands, "auto")]
    on_host = ("hard", "out_hard", "in_hard") if "kept" in name else ()
    with torch.device("meta"):
        meta = {key: tensor if key in on_host else tensor.to("meta") for key, tensor in operands.items()}
        leaf = next(iter(meta.values())).requires_grad_()
        results = case.call(meta, "auto")
        sum(y.sum() for y in results).backward()
    assert [y.shape for y in results] == expected and leaf.grad.shape == leaf.shape
    assert all(tensor.is_meta for tensor in (*results, leaf.grad))
