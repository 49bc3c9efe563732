"""Operands that reach further than 32 bits count: what the Triton kernels are told, and what backends compute."""

from collections import defaultdict

import pytest
import torch
from backends_here import DEVICE, backends

import atp_kernels
from atp_kernels import GroupPlan, KeptSlice, Projection, triton_runtime
from atp_kernels.dropout.definition import Dropout
from atp_kernels.linear.operands import Needs, Operands, Options, Saved

needs_triton = pytest.mark.skipif(not triton_runtime.AVAILABLE, reason=str(triton_runtime.REASON))
LIMIT = 2**31
STEP = 2**22  # between rows that kernels read in place


def reach(tensor):
    """The offset of the last element."""
    return sum((size - 1) * step for size, step in zip(tensor.shape, tensor.stride(), strict=True))


class Launches:
    """What kernels are launched with; nothing runs."""

    def __init__(self):
        self.noted = []

    def kernel(self, walked=None):
        """Takes the place of a kernel, which walks along its argument number `walked` by pointers of 64 bits."""

        def note(*arguments, **options):
            self.noted.append(([a for i, a in enumerate(arguments) if torch.is_tensor(a) and i != walked], options))

        return defaultdict(lambda: note)

    def assert_each_knows_how_far_it_reaches(self):
        assert self.noted
        for tensors, options in self.noted:
            far = any(reach(tensor) >= LIMIT for tensor in tensors)
            assert options.get("WIDE", False) == far


@pytest.fixture
def launches(monkeypatch):
    """Every kernel of the linear and of dropout, on tensors without memory."""
    from atp_kernels.dropout import triton as dropout
    from atp_kernels.linear import triton_kernels

    noted = Launches()
    monkeypatch.setattr(dropout, "dropout_kernel", noted.kernel())
    for name in ("masked_lora_gemm_kernel", "column_reduce_kernel", "sum_partials_kernel"):
        monkeypatch.setattr(triton_kernels, name, noted.kernel())
    monkeypatch.setattr(triton_kernels, "lora_down_kernel", noted.kernel(walked=1))
    return noted


def meta(*shape, row=None):
    """A tensor without memory, whose rows are `row` elements apart."""
    return torch.empty_strided(shape, (row or shape[1], 1)[-len(shape) :], device="meta", dtype=torch.float16)


@needs_triton
@pytest.mark.parametrize("far", ["x", "weight", "lora_b", "lora_input", "grad_y", None])
@pytest.mark.parametrize("mask_lora", [False, True])
@pytest.mark.parametrize("n", [600, 100], ids=["two-pass", "one-pass"])
def test_any_operand_of_the_linear_decides(launches, far, mask_lora, n):
    from atp_kernels.linear import triton as launcher

    sizes = {"x": (600, 70), "weight": (n, 70), "lora_b": (n, 4), "lora_input": (600, 70), "grad_y": (600, n)}
    t = {name: meta(*size, row=STEP if name == far else None) for name, size in sizes.items()}
    lora_a, mask = meta(4, 70), torch.empty(70, device="meta")
    operands = Operands(t["x"], t["weight"], lora_a, t["lora_b"], None, t["lora_input"], None, mask)
    results = launcher.forward(operands, Options(1.5, mask_lora))
    saved = Saved(*operands[:4], t["lora_input"], None, mask, results.s, None)
    needs = Needs(True, False, True, True, True, True, False, True, shared_input=False)
    launcher.backward(t["grad_y"], saved, Options(1.5, mask_lora), needs)
    launches.assert_each_knows_how_far_it_reaches()
    in_rows_of_n = far in ("weight", "lora_b") and n == 100  # 100 rows stay within 32 bits
    assert any(options.get("WIDE") for _, options in launches.noted) == (far is not None and not in_rows_of_n)


@needs_triton
def test_results_of_the_linear_decide_too(launches):
    from atp_kernels.linear import triton as launcher

    x, weight = meta(2**17, 16), meta(2**15, 16)
    mask = torch.empty(2**15, device="meta")
    operands = Operands(x, weight, meta(4, 16), meta(2**15, 4), None, None, mask)
    results = launcher.forward(operands, Options(1.5, keep_sum=True))
    assert reach(results.y) >= LIMIT
    saved = Saved(*operands[:4], None, mask, None, results.s, results.total)
    launcher.backward(meta(2**17, 2**15), saved, Options(1.5), Needs(True, False, True, True, True, False, True, False))
    launches.assert_each_knows_how_far_it_reaches()


@needs_triton
@pytest.mark.parametrize("rows", [2, 2**16])
def test_dropout_counts_its_result_and_not_only_what_it_repeats(launches, rows):
    from atp_kernels.dropout import triton as launcher

    launcher.dropped(meta(1, 2**16).expand(rows, -1), Dropout(0.5, 3))
    launches.assert_each_knows_how_far_it_reaches()
    assert launches.noted[0][1]["WIDE"] == (rows > 2)


@needs_triton
def test_a_width_whose_tiles_pass_32_bits_goes_to_the_vendor_gemm():
    from atp_kernels.linear import triton as launcher

    mask = torch.ones(2)
    for width in (2**23 - 1, 2**23):
        x, weight = torch.empty(3, 1).expand(3, width), torch.empty(1, 1).expand(2, width)
        assert launcher._fusion_pays(x, weight, torch.empty(1, 1).expand(4, width), mask, None) is (width < 2**23)


@needs_triton
def test_as_many_slots_as_the_first_axis_of_a_grid_takes(monkeypatch):
    from atp_kernels.groups import triton as launcher

    monkeypatch.setattr(launcher, "_table", lambda lines, plan: torch.tensor(lines))
    factor = torch.empty(1, 1).expand(2**22, 64)
    plan = GroupPlan((0,), (factor.shape,), *(torch.zeros(1, dtype=torch.int32) for _ in range(3)))
    _, (blocks, factors), _ = launcher._walk([factor], [factor], plan)
    assert (blocks, factors) == (2**17, 1)  # the second axis takes 65535


@needs_triton
@pytest.mark.parametrize(("capability", "runs"), [((7, 5), False), ((8, 0), True), ((12, 1), True)])
def test_triton_takes_gpus_that_it_supports(monkeypatch, capability, runs):
    monkeypatch.setattr(triton_runtime, "INTERPRETED", False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    said = triton_runtime.misfit(torch.device("cuda", 0))
    assert said == (None if runs else "the triton backend needs CUDA capability 8.0 and cuda:0 is of 7.5")


def far_apart(tensor):
    """The same values in rows so far apart that the last one begins beyond 2**31 elements."""
    step = LIMIT // (tensor.shape[0] - 1) + 1
    size = step * (tensor.shape[0] - 1) + tensor.shape[1]
    storage = torch.empty(size, dtype=tensor.dtype, device=tensor.device)  # a CPU takes pages when they are used
    return storage.as_strided(tensor.shape, (step, 1)).copy_(tensor)


def normal(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(DEVICE, torch.bfloat16)


def linear(x, backend):
    mask, bias = torch.tensor([True, False] * 4, device=DEVICE), torch.ones(8, dtype=torch.bfloat16, device=DEVICE)
    options = {"out_mask": mask, "bias": bias, "scaling": 1.5, "backend": backend}
    return atp_kernels.masked_lora_linear(x, normal(8, 6), normal(2, 6), normal(8, 2), **options)


def kept(x, backend):
    mask = torch.tensor([True, False, True, False, False, True], device=DEVICE)
    slice_ = KeptSlice(normal(8, 6), in_mask=mask, pad_to=1)
    return atp_kernels.kept_lora_linear(x, slice_, normal(2, 6), normal(8, 2), scaling=1.5, backend=backend)


def swiglu(x, backend):
    gate = Projection(normal(8, 6), normal(2, 6), normal(8, 2), 1.5)
    down = Projection(normal(6, 8), normal(2, 8), normal(6, 2), 1.5)
    return atp_kernels.masked_lora_swiglu(x, gate, gate, down, backend=backend)


def norm(x, backend):
    return atp_kernels.rms_norm(x, torch.arange(6.0, device=DEVICE), eps=1e-6, backend=backend)


def dropout(x, backend):
    return atp_kernels.lora_dropout(x, 0.4, 3, backend=backend)


def compact(x, backend):
    return atp_kernels.compact(x, *torch.tensor([[2, 0], [5, 1]], device=DEVICE), backend=backend)


def entropy(x, backend):
    return atp_kernels.cross_entropy_(x, torch.tensor([0, 2, 4], device=DEVICE), backend=backend)


def prox(x, backend):
    removed = torch.tensor([True, False, True], device=DEVICE)
    atp_kernels.group_prox_([x], [(0, torch.arange(3, device=DEVICE))], removed, 0.5, backend=backend)
    return x.clone()


def lasso(x, backend):
    groups, removed = [(1, torch.arange(6, device=DEVICE))], torch.ones(6, dtype=torch.bool, device=DEVICE)
    return atp_kernels.group_lasso([x], groups, removed, backend=backend)


CALLS = {
    "masked_lora_linear": linear,
    "kept_lora_linear": kept,
    "masked_lora_swiglu": swiglu,
    "rms_norm": norm,
    "lora_dropout": dropout,
    "compact": compact,
    "cross_entropy_": entropy,
    "group_prox_": prox,
    "group_lasso": lasso,
}
IN_PLACE = ("cross_entropy_", "group_prox_")


@pytest.mark.parametrize(("op", "backend"), [(op, name) for op in CALLS for name in backends(op, torch.bfloat16)])
def test_rows_that_begin_beyond_32_bits(op, backend):
    near = normal(3, 6)
    far = far_apart(near)
    leaves = [matrix if op in (*IN_PLACE, "compact") else matrix.requires_grad_() for matrix in (near, far)]
    results = [CALLS[op](leaf, backend) for leaf in leaves]
    torch.testing.assert_close(results[1], results[0])
    if op in IN_PLACE:
        torch.testing.assert_close(far, near)
    elif op != "compact":
        grads = [torch.autograd.grad(result.sum(), leaf)[0] for result, leaf in zip(results, leaves, strict=True)]
        torch.testing.assert_close(*grads)
