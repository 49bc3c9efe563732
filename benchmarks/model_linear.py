"""A model of one linear in every way that the library knows: operations, bytes, launches, time. It measures no GPU.

    python -m benchmarks.model_linear --model llama2-7b --tokens 8192 --keep 0.6 --gpu h100

Forward and backward of a linear whose outputs a mask removes, in the regimes of a tuned table (docs/kernels.md),
by the rates of `benchmarks.model_step`. Masks and vectors are left out of the bytes, what is made once per decision of
everything.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from dataclasses import replace

import torch

from atp.families import Linear
from benchmarks.layer_model import Kernel, Step, kept_linear, masked_triton, plain, unfused
from benchmarks.model_step import parser, shapes_of, total
from benchmarks.rates import find_rates

Way = Callable[[Step, Linear, Linear], Iterator[Kernel]]
"""The kernels of a step for a linear, given whole and as the mask leaves it."""
_EXTRA = "adapter and masks"


def masked_addmm(step: Step, linear: Linear, kept: Linear) -> Iterator[Kernel]:
    """The addmm idiom, and passes for a soft mask: y, its gradient, and the sum for the gradient of the mask."""
    yield from plain(step, linear)
    yield step.pass_(_EXTRA, 2 + 2 + 2, linear.out_features, 4)


def folded(step: Step, linear: Linear, kept: Linear) -> Iterator[Kernel]:
    """One product each way with a weight into which mask and adapter are folded in each step."""
    m, n, k, r = step.tokens, linear.out_features, linear.in_features, step.rank
    masked = step.phase != "tune"
    yield Kernel(_EXTRA, 0.0, step.item * 2.0 * n * k, 2) if masked else Kernel(_EXTRA, 0.0, 0.0, 0)
    yield step.product(n, k, r, row=_EXTRA, again=n * k)
    yield step.product(m, n, k)
    yield step.product(m, k, n)  # dx
    if step.learns:
        yield step.product(m, r, k, row=_EXTRA)  # S
        yield step.product(m, r, n, row=_EXTRA)  # P
        yield step.product(r, k, m, row=_EXTRA)  # dA
        yield step.product(n, r, m, row=_EXTRA)  # dB
    else:
        yield step.pass_(_EXTRA, 2, n, 3)  # column sums of G y, in two stages, and the quotient


def extended(step: Step, linear: Linear, kept: Linear, *, copied: bool) -> Iterator[Kernel]:
    """[X | S] [W | s B]^T and [dY | P] [W; A]: the adapter as further columns and rows of the products themselves.

    copied: the operands are put together in each pass; else x, dy and the weight lie in such memory from the start, and
    only s B and A, which the optimizer changes, are written there.
    """
    m, n, k, r = step.tokens, linear.out_features, linear.in_features, step.rank
    yield step.product(m, r, k, row=_EXTRA)  # S
    yield step.product(m, n, k + r)
    yield step.product(m, r, n, row=_EXTRA)  # P
    yield step.product(m, k, n + r)  # dx
    yield step.product(r, k, m, row=_EXTRA)  # dA
    yield step.product(n, r, m, row=_EXTRA)  # dB
    moved = (m * k + m * n + 2 * n * k) if copied else 0
    yield Kernel(_EXTRA, 0.0, step.item * 2.0 * (moved + r * (n + k)), 4 if copied else 2)


def in_order(step: Step, linear: Linear, kept: Linear) -> Iterator[Kernel]:
    """A slice with activations in the model's order: y is spread before the adapter is added, dy gathered."""
    m, n, k, rows = step.tokens, linear.out_features, linear.in_features, kept.out_features
    yield step.product(m, rows, k)
    yield step.product(m, k, rows, again=m * k)  # dx
    yield Kernel(_EXTRA, 0.0, step.item * float(m) * (2 * rows + n + rows + n), 2)
    every = list(plain(step, linear))
    yield from (kernel for kernel in every if kernel.row == _EXTRA)


def per_call(step: Step, linear: Linear, kept: Linear) -> Iterator[Kernel]:
    """As `in_order`, with the slice gathered from the weight in each pass."""
    yield from in_order(step, linear, kept)
    yield Kernel(_EXTRA, 0.0, step.item * 2.0 * 2 * kept.out_features * linear.in_features, 2)


WAYS: dict[str, dict[str, Way]] = {
    "decision": {
        "unfused": lambda step, linear, _: unfused(step, linear, 0),
        "reference": masked_addmm,
        "triton": lambda step, linear, _: masked_triton(step, linear),
        "folded": folded,
    },
    "search": {
        "unfused": lambda step, linear, _: unfused(step, linear, 0),
        "addmm without a mask": lambda step, linear, _: plain(replace(step, way="dense"), linear),
        "sliced, per call": per_call,
        "sliced, model's order": in_order,
        "sliced, kept first": lambda step, linear, kept: kept_linear(step, linear, 0, kept),
        "zeroed": lambda step, linear, _: plain(step, linear),
        "folded": folded,
    },
    "tune": {
        "unfused": lambda step, linear, kept: unfused(step, kept, None),
        "reference": lambda step, linear, kept: plain(step, kept),
        "folded": lambda step, linear, kept: folded(step, kept, kept),
        "extended, copied": lambda step, linear, kept: extended(step, kept, kept, copied=True),
        "extended, in place": lambda step, linear, kept: extended(step, kept, kept, copied=False),
    },
}
"""By phase. `tune` computes the kept part alone, in every way."""


def table(step: Step, name: str, gpu: str) -> list[str]:
    """A line per phase and way of one linear."""
    rates = find_rates(gpu, torch.float32)
    whole, kept = (layers[0].linears[name] for layers in (step.shapes.whole, step.shapes.kept))
    lines = [f"{name} {whole.out_features} x {whole.in_features}, {kept.out_features} outputs kept"]
    lines.append(f"{'phase':<10}{'way':<24}{'GFLOP':>9}{'MB':>9}{'launches':>10}{'us':>9}")
    for phase, ways in WAYS.items():
        for way, kernels in ways.items():
            found = total(kernels(replace(step, phase=phase), whole, kept), rates)
            cells = f"{found.flops / 1e9:>9,.0f}{found.bytes / 1e6:>9,.0f}{found.launches:>10}"
            lines.append(f"{phase:<10}{way:<24}{cells}{1e6 * found.seconds:>9,.0f}")
    return lines


def main(arguments: list[str] | None = None) -> int:
    """Prints the table of a linear per kind and returns the exit status."""
    own = parser()
    own.description = (__doc__ or "").splitlines()[0]
    options = own.parse_args(arguments)
    if options.gpu == "cpu" or options.compare:
        print("this is a model of GPUs: give --gpu h100 and no --compare", file=sys.stderr)
        return 2
    try:
        shapes = shapes_of(options.model, options.keep, options.gpu)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    step = Step(shapes, options.tokens, min(options.length, options.tokens), options.rank, 2, "tune", "ours")
    print("A model at peak rates, not a measurement.")
    for name in ("self_attn.q_proj", "mlp.gate_proj"):
        print("", *table(step, name, options.gpu), sep="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
