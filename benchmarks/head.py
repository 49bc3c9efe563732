"""Cross-entropy from hidden states: ours against torch's `linear_cross_entropy` and against whole logits.

    python -m benchmarks.head --dtype bfloat16

Forward and backward with a gradient of the hidden states alone, taken in turns on the same data; median and least
seconds, and the relative error of the sum against float64.
"""

import argparse
import time
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from atp.training.cross_entropy import linear_cross_entropy
from benchmarks.measure import quantile

TOKENS, HIDDEN, VOCABULARY = 1024, 576, 49152  # a step of SmolLM2-135M
_CHUNK = 512  # rows per chunk at which torch's was fastest here

Loss = Callable[[Tensor, Tensor, Tensor], Tensor]


def forms() -> dict[str, Loss]:
    """The forms by name, each a sum over tokens; torch's only where this torch has it."""
    found: dict[str, Loss] = {
        "ours": linear_cross_entropy,
        "logits": lambda hidden, weight, targets: cross_entropy((hidden @ weight.T).float(), targets, reduction="sum"),
    }
    theirs = getattr(torch.nn.functional, "linear_cross_entropy", None)
    if theirs is not None:
        options = torch.nn.LinearCrossEntropyOptions
        found["torch"] = partial(theirs, reduction="sum", options=options())
        chunked = options(batch_chunk_size=_CHUNK, acc_policy="compact")
        found["torch_chunked"] = partial(theirs, reduction="sum", options=chunked)
    return found


def main() -> None:
    """Print one line per form."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.head", description=__doc__.splitlines()[0])
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16")
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    rng = torch.Generator().manual_seed(0)
    hidden = torch.randn(TOKENS, HIDDEN, generator=rng).to(getattr(torch, options.dtype)).requires_grad_()
    weight = (0.05 * torch.randn(VOCABULARY, HIDDEN, generator=rng)).to(hidden.dtype)
    targets = torch.randint(VOCABULARY, (TOKENS,), generator=rng)
    exact = float(cross_entropy(hidden.detach().double() @ weight.double().T, targets, reduction="sum"))
    seconds: dict[str, list[float]] = {name: [] for name in forms()}
    errors = {}
    for round_ in range(options.rounds + 1):  # the first warms up
        for name, loss_of in forms().items():
            started = time.perf_counter()
            loss = loss_of(hidden, weight, targets)
            torch.autograd.grad(loss, hidden)
            if round_:
                seconds[name].append(time.perf_counter() - started)
            errors[name] = abs(float(loss.detach()) - exact) / exact
    for name, taken in seconds.items():
        taken.sort()
        print(f"{name:14} median {quantile(taken, 0.5):.3f} s, least {taken[0]:.3f} s, error {errors[name]:.1e}")


if __name__ == "__main__":
    main()
