"""Operands that reach further than 32 bits count: what the Triton kernels are told, and what backends compute."""

from collections import defaultdict
from dataclasses import replace

import pytest
import torch
from backends_here import backends
from operation_cases import CASES
from torch.testing import assert_close

from atp_kernels import GroupPlan, triton_runtime
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


FAR = (
    "linear-hard", "kept", "swiglu-plain", "rms_norm-narrow", "add_rms_norm", "lora_dropout", "compact",
    "cross_entropy_", "group_prox_", "group_lasso-separate",
)  # fmt: skip


def far_apart(tensor):
    """The same values in rows so far apart that the last one begins beyond 2**31 elements."""
    step = LIMIT // (tensor.shape[0] - 1) + 1
    size = step * (tensor.shape[0] - 1) + tensor.shape[1]
    storage = torch.empty(size, dtype=tensor.dtype, device=tensor.device)  # a CPU takes pages when they are used
    return storage.as_strided(tensor.shape, (step, 1)).copy_(tensor)


@pytest.mark.parametrize(("name", "backend"), [(n, b) for n in FAR for b in backends(CASES[n].op, torch.bfloat16)])
def test_rows_that_begin_beyond_32_bits(name, backend):
    case = CASES[name]
    case = replace(case, shapes={operand: shape[-2:] for operand, shape in case.shapes.items()})
    first, near, far = next(iter(case.shapes)), case.operands(torch.bfloat16), case.operands(torch.bfloat16)
    far[first] = far_apart(far[first])
    expected = case.run(near, backend, torch.ones_like)
    assert_close(case.run(far, backend, torch.ones_like), expected)
