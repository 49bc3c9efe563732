"""Operands with a side of size zero: every backend gives the empty result, or the same sentence."""

import pytest
import torch
from backends_here import DEVICE, backends
from operation_cases import CASES, K, M, N, R

import atp_kernels


def ones(*size):
    return torch.ones(size, device=DEVICE)


@pytest.mark.parametrize("size", [M, N, K, R], ids=["rows", "n_out", "n_in", "rank"])
@pytest.mark.parametrize("name", [n for n in CASES if n.startswith(("linear", "kept", "swiglu", "qkv"))])
def test_linears_slices_and_blocks_of_a_zero_size(name, size):
    case = CASES[name].sized({size: 0})
    results = [case.run(case.operands(torch.float32), b, torch.ones_like) for b in backends(case.op)]
    for other in results:
        torch.testing.assert_close(other, results[0])
        assert other["d x"].shape == case.shapes["x"]


@pytest.mark.parametrize("shape", [(0, 3), (4, 0), (0, 0)], ids=str)
@pytest.mark.parametrize("axis", [0, 1])
def test_group_operations_of_a_zero_size(shape, axis):
    n_groups = shape[axis]
    groups, removed = [(axis, torch.arange(n_groups, device=DEVICE))], ones(n_groups).bool()
    for backend in backends("group_lasso"):
        factor = ones(*shape).requires_grad_()
        value = atp_kernels.group_lasso([factor], groups, removed, eps=0.25, backend=backend)
        assert torch.autograd.grad(value, factor)[0].shape == shape
        direct = atp_kernels.group_lasso_grad_([factor], groups, removed, eps=0.25, backend=backend)
        atp_kernels.group_prox_([factor.detach()], groups, removed, 0.5, backend=backend)
        assert value.item() == direct.item() == 0.5 * n_groups  # sqrt(eps) for every row or column that is there


def test_rows_and_gathers_of_a_zero_size():
    weight, empty = ones(4, 3), torch.zeros(2, dtype=torch.int64, device=DEVICE)[:0]
    for backend in backends("compact"):
        for rows, cols, shape in ((empty, None, (0, 3)), (None, empty, (4, 0)), (empty, empty, (0, 0))):
            assert atp_kernels.compact(weight, rows, cols, 8, backend=backend).shape == shape
        assert atp_kernels.compact(ones(0, 0), empty, empty, backend=backend).shape == (0, 0)
    for backend in backends("lora_dropout"):
        for shape in ((0, 3), (2, 0), (2, 0, 3), (2, 3, 0), (0,)):
            assert atp_kernels.lora_dropout(ones(*shape), 0.5, 1, backend=backend).shape == shape
    for backend in backends("rms_norm"):
        for shape in ((0, 3), (2, 0, 3), (3,)):
            assert atp_kernels.rms_norm(ones(*shape), ones(3), eps=1e-6, backend=backend).shape == shape
            both = atp_kernels.add_rms_norm(ones(*shape), ones(*shape), ones(3), eps=1e-6, backend=backend)
            assert [result.shape for result in both] == [shape, shape]
        with pytest.raises(ValueError, match=r"x is torch.float32 of shape \[2, 0\]"):
            atp_kernels.rms_norm(ones(2, 0), ones(0), eps=1e-6, backend=backend)
    for backend in backends("cross_entropy_"):
        assert atp_kernels.cross_entropy_(ones(0, 3), empty, backend=backend).shape == (0,)
