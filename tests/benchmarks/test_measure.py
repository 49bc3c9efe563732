"""Time and memory as the benchmarks take them."""

import sys
import time

import pytest
import torch
from torch import nn

from benchmarks.case import Variant
from benchmarks.measure import (
    held_bytes,
    interleave,
    peak_bytes,
    quantile,
    ratio,
    reset_resident_peak,
    resident_peak_bytes,
)


def test_rounds_are_interleaved():
    order = []

    def variant(name, seconds):
        def call():
            order.append(name)
            time.sleep(seconds)

        return Variant(call)

    times = interleave({"slow": variant("slow", 0.02), "quick": variant("quick", 0.001)}, "forward", 3, "cpu")
    assert order == ["slow", "quick", "quick", "slow", "slow", "quick"]
    assert len(times["slow"]) == 3 and min(times["slow"]) >= 20 > min(times["quick"]) >= 1


def test_backward_is_timed_without_its_forward():
    calls = []
    x = torch.ones(3, requires_grad=True)

    def forward():
        calls.append("forward")
        return 2 * x

    variant = Variant(forward, (x,), torch.ones(3))
    backward = variant.prepare("backward")
    assert calls == ["forward"]
    assert torch.equal(backward()[0], torch.full((3,), 2.0)) and calls == ["forward"]
    full = variant.prepare("full")
    assert calls == ["forward"]
    full()
    assert calls == ["forward", "forward"]


@pytest.mark.parametrize(("share", "value"), [(0.2, 2), (0.5, 3), (0.8, 4), (0.0, 1), (1.0, 5)])
def test_quantiles(share, value):
    assert quantile([4, 2, 5, 1, 3], share) == value


def test_a_ratio_is_of_the_same_round():
    assert ratio([3.0, 30.0, 6.0], [2.0, 20.0, 3.0]) == 1.5  # of medians it would be 2
    with pytest.raises(ValueError, match="zip"):
        ratio([1.0], [1.0, 2.0])


def test_blocks_of_an_earlier_profile_do_not_lower_the_peak():
    mib = 2**20
    blocks = []
    peak_bytes(Variant(lambda: blocks.append(torch.empty(8 * mib, dtype=torch.uint8))), "forward", "cpu")

    def call():
        blocks.clear()
        return torch.empty(2 * mib, dtype=torch.uint8)

    assert peak_bytes(Variant(call), "forward", "cpu") == pytest.approx(2 * mib, abs=1024)


def test_peak_counts_what_lives_at_a_time():
    mib = 2**20

    def call():
        a = torch.empty(mib, dtype=torch.uint8)
        b = torch.empty(2 * mib, dtype=torch.uint8)
        del a
        c = torch.empty(4 * mib, dtype=torch.uint8)
        del b
        return c

    assert peak_bytes(Variant(call), "forward", "cpu") == pytest.approx(6 * mib, abs=1024)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_resident_peak_is_that_since_the_reset():
    mib = 2**20
    reset_resident_peak()
    before = resident_peak_bytes()
    torch.ones(64 * mib, dtype=torch.uint8)
    peak = resident_peak_bytes()
    assert peak - before == pytest.approx(64 * mib, abs=8 * mib)
    reset_resident_peak()
    assert resident_peak_bytes() < peak - 56 * mib


def test_held_bytes_follows_containers_attributes_and_gradients_once():
    layer = nn.Linear(8, 4, bias=False)  # 128 bytes
    twin = nn.Linear(8, 4, bias=False)
    twin.weight = layer.weight
    assert held_bytes((layer, twin)) == 128
    layer.weight.grad = torch.zeros(4, 8)
    optimizer = torch.optim.AdamW(layer.parameters())
    optimizer.step()
    step = optimizer.state[layer.weight]["step"].untyped_storage().nbytes()
    assert held_bytes(({"any": [layer]}, optimizer)) == 4 * 128 + step  # weight, gradient, two moments
    assert held_bytes((torch.zeros(10)[2:4],)) == 40  # a view keeps all of its storage
