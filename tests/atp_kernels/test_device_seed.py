"""Dropout by a seed on the device, which kernels read and the host does not; on a CPU a tensor stands in for it."""

from functools import partial

import pytest
import torch
from backends_here import DEVICE, backends, on_device
from linear_cases import SEED, Shape, operands, with_gradients

from atp_kernels import checks, lora_dropout, masked_lora_linear_with_norms, new_seed
from atp_kernels.checks import check_dropout
from atp_kernels.dropout import definition, op

BACKENDS = [name for name in ("reference", "triton") if name in backends("masked_lora_linear")]
SHAPES = [
    Shape(m=20, n=24, k=40, out_mask="soft", in_mask="soft", mask_lora=mask_lora, p=0.4) for mask_lora in (False, True)
]
X = torch.ones(6, 20, device=DEVICE)


@pytest.fixture
def placed(monkeypatch):
    """Makes a seed that is taken for one on the device."""
    monkeypatch.setattr(op, "unread", lambda seed: seed)
    return partial(torch.tensor, device=DEVICE)


@pytest.mark.parametrize("seed", [SEED, 3, -1, 2**32 + 5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_drops_what_the_same_seed_on_the_host_does(placed, backend, shape, dtype, seed):
    tensors = on_device(operands(shape, dtype))
    options = shape.options | {"backend": backend}
    got, expected = (
        with_gradients(masked_lora_linear_with_norms(**tensors, **options | {"seed": each}), tensors)
        for each in (placed(seed), seed)
    )
    for name, value in got.items():
        assert torch.equal(value, expected[name]), name


@pytest.mark.parametrize("backend", BACKENDS)
def test_on_its_own_it_drops_the_same(placed, backend):
    x = X.clone().requires_grad_()
    results = []
    for seed in (placed(SEED), SEED):
        y = lora_dropout(x, 0.5, seed, backend=backend)
        results.append((y, *torch.autograd.grad(y.sum(), x)))
    assert all(map(torch.equal, *results))


def test_the_definition_reads_no_seed_on_the_host():
    values, seed = torch.empty(5, 6, device="meta"), torch.empty((), dtype=torch.int64, device="meta")
    assert definition.dropped(values, definition.Dropout(0.5, seed)).shape == (5, 6)


def test_a_seed_that_changes_before_backward_is_refused(placed):
    tensors, seed = on_device(operands(SHAPES[0], torch.float32)), placed(SEED)
    x = X.clone().requires_grad_()
    masked = masked_lora_linear_with_norms(**tensors, **SHAPES[0].options | {"seed": seed})[0]
    results = masked, lora_dropout(x, 0.5, seed)
    seed.add_(1)
    for result in results:
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            result.sum().backward()


def test_lies_on_the_cpu_or_beside_the_input():
    here, there, seed = X.cpu(), X.to("meta"), torch.tensor(1)
    for x, good in ((here, seed), (there, seed), (there, seed.to("meta"))):
        check_dropout(x, 0.5, good, None)
    message = r"seed is a torch.* tensor .*: give an int or a 0-d int64 tensor {}\."
    for x, bad, places in ((here, seed.to("meta"), "on the CPU"), (there, seed.float(), "on the CPU or on meta")):
        with pytest.raises(ValueError, match=message.format(places)):
            check_dropout(x, 0.5, bad, None)


def test_a_graph_takes_a_seed_on_the_device_alone(monkeypatch):
    x = X.to("meta")
    host = [new_seed(x) for _ in range(2)]
    assert all(seed.device.type == "cpu" for seed in host) and not torch.equal(*host)
    monkeypatch.setattr(checks, "is_capturing", lambda device: True)
    monkeypatch.setattr("atp_kernels.dropout.is_capturing", lambda device: True)
    with pytest.raises(RuntimeError, match="a CUDA graph cannot capture dropout with a seed on the host"):
        check_dropout(x, 0.5, host[0], None)
    drawn = new_seed(x)
    assert drawn.device == x.device
    check_dropout(x, 0.5, drawn, None)
