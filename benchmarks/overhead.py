"""What a call of masked_lora_linear costs beyond its ATen calls, on operands too small for those to matter.

    python -m benchmarks.overhead

Against an autograd.Function of the same ATen calls without checks, dispatch or options: the medians of forward, and of
forward and backward, taken in turns, in microseconds.
"""

import argparse
import time
from collections.abc import Callable

import torch
from torch import Tensor

from atp_kernels import masked_lora_linear
from benchmarks.baselines import AddmmLora
from benchmarks.measure import quantile

ROWS, OUT, IN, RANK = 8, 16, 16, 4


def microseconds(calls: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Median of every call; the first tenth of the rounds warms up and is not counted."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for round_ in range(rounds):
        for name, call in calls.items():
            start = time.perf_counter_ns()
            call()
            if round_ >= rounds // 10:
                times[name].append(1e-3 * (time.perf_counter_ns() - start))
    return {name: quantile(sorted(values), 0.5) for name, values in times.items()}


def measure(rounds: int) -> dict[str, tuple[float, float]]:
    """(plain, ours) microseconds of the forward pass and of forward and backward."""
    rng = torch.Generator().manual_seed(0)
    x, weight, lora_a, lora_b = (
        torch.randn(size, generator=rng) for size in ((ROWS, IN), (OUT, IN), (RANK, IN), (OUT, RANK))
    )
    wanted = [tensor.requires_grad_() for tensor in (x, lora_a, lora_b)]
    grad = torch.ones(ROWS, OUT)
    forward = {
        "plain": lambda: AddmmLora.apply(x, weight, lora_a, lora_b),
        "ours": lambda: masked_lora_linear(x, weight, lora_a, lora_b, scaling=1.0),
    }

    def both(call: Callable[[], Tensor]) -> Callable[[], object]:
        return lambda: torch.autograd.grad(call(), wanted, grad)

    passes = {"forward": forward, "forward and backward": {name: both(call) for name, call in forward.items()}}
    return {name: tuple(microseconds(calls, rounds).values()) for name, calls in passes.items()}


def main() -> None:
    """Print the medians and their differences."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.overhead", description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=4000)
    rounds = parser.parse_args().rounds
    torch.set_num_threads(1)
    for name, (plain, ours) in measure(rounds).items():
        print(f"{name}: {ours:.1f} us, plain autograd.Function {plain:.1f} us, overhead {ours - plain:.1f} us")


if __name__ == "__main__":
    main()
