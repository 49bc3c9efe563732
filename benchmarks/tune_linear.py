"""LoRA without masks: does anything beat the `addmm_` chain that the dispatcher takes?

    python -m benchmarks.tune_linear --model llama2-7b --rank 8 16 --dtype float32 bfloat16

Forward passes in turns, medians in milliseconds; the backward pass is the same for all. The chain runs twice: a gain
within the difference of its two medians is noise. The one product is [x, S] [W, B]^T, with the weight copied by every
call or held in rows of K + r elements; Triton, on a GPU alone, is the kernel that masked calls take.
"""

import argparse
from collections.abc import Callable

import torch
from torch import Tensor

from atp_kernels import masked_lora_linear
from benchmarks.measure import clock, quantile
from benchmarks.shapes import find_model

CHAIN, AGAIN = "addmm_", "addmm_ again"


def concatenated(x: Tensor, weight: Tensor, lora_a: Tensor, lora_b: Tensor) -> Tensor:
    """One vendor product after S, over operands joined by every call."""
    return torch.cat([x, x @ lora_a.T], 1) @ torch.cat([weight, lora_b], 1).T


def prepared(x: Tensor, rows: Tensor, lora_a: Tensor, lora_b: Tensor) -> Tensor:
    """The same over a weight that lies in rows of K + r elements already: only B is copied behind it."""
    rows[:, x.shape[1] :].copy_(lora_b)
    return torch.cat([x, x @ lora_a.T], 1) @ rows.T


def candidates(
    tokens: int, n_out: int, n_in: int, rank: int, dtype: torch.dtype, device: str
) -> dict[str, Callable[[], Tensor]]:
    """Every way to compute one layer, on the same random operands."""
    rng = torch.Generator(device).manual_seed(0)
    randn = lambda *size: torch.randn(size, generator=rng, device=device)  # noqa: E731
    x, lora_b = randn(tokens, n_in).to(dtype), randn(n_out, rank).to(dtype)
    weight, lora_a = ((randn(size, n_in) / n_in**0.5).to(dtype) for size in (n_out, rank))
    rows = torch.cat([weight, lora_b], 1)
    operands = x, weight, lora_a, lora_b
    chain = lambda: masked_lora_linear(*operands, scaling=1.0, backend="reference")  # noqa: E731
    ways = {
        CHAIN: chain,
        AGAIN: chain,
        "one product": lambda: concatenated(*operands),
        "one product, prepared": lambda: prepared(x, rows, lora_a, lora_b),
    }
    if device == "cuda":
        from atp_kernels.linear import triton as launcher
        from atp_kernels.linear.operands import Operands, Options
        from atp_kernels.linear.tiles import gemm_config

        config = gemm_config(tokens, n_out, rank, dtype)
        ways["triton"] = lambda: launcher.forward(Operands(*operands), Options(1.0), config=config).y
    return ways


def medians(ways: dict[str, Callable[[], Tensor]], rounds: int, device: str) -> dict[str, float]:
    """Milliseconds of every way; a first round warms up and is not counted."""
    timed = clock(device)
    times = [[timed(call) for call in ways.values()] for _ in range(rounds + 1)][1:]
    return {name: quantile(sorted(column), 0.5) for name, column in zip(ways, zip(*times, strict=True), strict=True)}


def main() -> None:
    """Print a line a case, with the best way and its gain over the better run of the chain."""
    cuda = torch.cuda.is_available()
    parser = argparse.ArgumentParser(prog="python -m benchmarks.tune_linear", description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="llama2-7b" if cuda else "smollm2-135m")
    parser.add_argument("--rank", type=int, nargs="+", default=[8, 16])
    parser.add_argument("--dtype", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--tokens", type=int, default=8192 if cuda else 1024)
    parser.add_argument("--rounds", type=int, default=21)
    options = parser.parse_args()
    device = "cuda" if cuda else "cpu"
    torch.set_num_threads(2)
    model = find_model(options.model)
    shapes = dict.fromkeys(model.linears[name] for name in model.shapes)
    for dtype, (n_out, n_in), rank in ((d, s, r) for d in options.dtype for s in shapes for r in options.rank):
        ways = candidates(options.tokens, n_out, n_in, rank, getattr(torch, dtype), device)
        with torch.no_grad():
            found = medians(ways, options.rounds, device)
        best = min(found, key=found.get)
        gain = min(found[CHAIN], found[AGAIN]) / found[best]
        noise = max(found[CHAIN], found[AGAIN]) / min(found[CHAIN], found[AGAIN])
        shown = "  ".join(f"{name} {value:.3f}" for name, value in found.items())
        print(f"{n_out}x{n_in} r{rank} {dtype}: {shown} ms -> {best}, {gain:.3f}x (noise {noise:.3f}x)", flush=True)


if __name__ == "__main__":
    main()
