"""FLOPs and bytes of the operations against numbers worked out by hand, and the limit they set."""

import pytest
import torch

from atp_kernels.groups.bench import factor_shapes
from benchmarks.case import Case, Work
from benchmarks.limits import Limits
from benchmarks.registry import find_ops
from benchmarks.shapes import find_model


def work(op, pass_, **changes):
    values = {"model": "tiny", "part": "gate_proj", "tokens": 10, "rank": 4, "dtype": "float32", "keep": 0.5}
    case = Case(op, **values | changes)
    (found,) = find_ops([op])
    return found.work_of(case, pass_)


# gate_proj of the tiny model is 96 x 64 (out x in); M 10, r 4, so r (in + out) = 640.
PRODUCT = 2 * 10 * 96 * 64  # 122,880


@pytest.mark.parametrize(
    ("op", "pass_", "flops", "entries", "more_bytes"),
    [
        # x, W, A and B, y, and S = x A^T that is saved; backward reads dy, W, A, B, x, S, writes dx, dA, dB.
        ("linear_unmasked", "forward", PRODUCT + 2 * 10 * 640, 640 + 6144 + 640 + 960 + 40, 0),
        ("linear_unmasked", "backward", PRODUCT + 4 * 10 * 640, 960 + 6144 + 640 + 640 + 40 + 640 + 640, 0),
        # Half of one side: half of the product and of the weight, all of the rest.
        ("linear_hard_out", "forward", PRODUCT / 2 + 2 * 10 * 640, 640 + 3072 + 640 + 960 + 40, 0),
        ("linear_hard_in", "forward", PRODUCT / 2 + 2 * 10 * 640, 640 + 3072 + 640 + 960 + 40, 0),
        ("linear_hard_both", "backward", PRODUCT / 4 + 4 * 10 * 640, 960 + 1536 + 640 + 640 + 40 + 640 + 640, 0),
        # The sum is saved instead of S and the mask multiplied; backward reads it and writes 96 float32 dL/dm.
        ("linear_decision", "forward", PRODUCT + 2 * 10 * 640 + 960, 640 + 6144 + 640 + 960 + 960, 4 * 96),
        ("linear_decision", "backward", PRODUCT + 2 * 10 * 640 + 3 * 960, 960 + 6144 + 640 + 640 + 960, 8 * 96),
        # Half the rows and half the columns read and written, and 48 + 32 indices of 8 bytes.
        ("compact", "forward", 0, 2 * 48 * 32, 8 * 80),
    ],
)
def test_work_by_hand(op, pass_, flops, entries, more_bytes):
    for dtype, item in (("float32", 4), ("bfloat16", 2)):
        found = work(op, pass_, dtype=dtype)
        assert found.flops == flops and found.bytes == item * entries + more_bytes


def test_full_is_forward_and_backward_and_a_training_step_its_products():
    forward, backward, full = (work("linear_unmasked", pass_) for pass_ in ("forward", "backward", "full"))
    assert full == Work(forward.flops + backward.flops, forward.bytes + backward.bytes)
    # Linears of the tiny model: 2 x (64 x 64 + 2 x 32 x 64 + 64 x 64 + 3 x 96 x 64) = 61,440; head 64 x 128.
    dense, half = 2 * 10 * (61_440 + 8_192), 2 * 10 * (30_720 + 8_192)
    assert work("train_tune", "full", part="kv_group").flops == 2 * half
    assert work("train_decision", "full", part="kv_group").flops == 2 * dense


def test_work_of_groups_by_hand():
    # A layer of the tiny model, r 4: B of q, k, v, gate, up has 64 + 32 + 32 + 96 + 96 rows, A of o and down 64 + 96
    # columns: 480 groups of 4 entries; two layers.
    assert len(factor_shapes(find_model("tiny"), 4)) == 14
    entries, groups = 2 * 480 * 4, 2 * 480
    assert work("group_lasso", "forward") == Work(2 * entries, 4 * entries + 4 * groups)
    assert work("group_lasso", "backward") == Work(entries / 2, 4 * entries * 1.5 + 4 * groups)
    # kv_group: of a layer 2 groups in each of q, k, v and o, and 3 * 96.
    assert work("group_lasso", "forward", part="kv_group") == Work(2 * entries, 4 * entries + 4 * 2 * 296)
    assert work("group_prox", "forward") == Work(1.5 * entries, 4 * entries)


def test_limits_are_those_of_the_longer_of_computing_and_moving():
    limits = Limits(flops=1e12, bandwidth=1e9)
    assert limits.milliseconds(Work(2e9, 1e3)) == pytest.approx(2.0)
    assert limits.milliseconds(Work(2e3, 5e6)) == pytest.approx(5.0)
    limits = Limits.measured("cpu", torch.float32, gemm=128, copy_bytes=2**20)
    assert 1e8 < limits.flops < 1e14 and 1e7 < limits.bandwidth < 1e13
