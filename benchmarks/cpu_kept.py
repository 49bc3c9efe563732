"""The LoRA step with hard masks on a CPU: the kept slice beside unfused masked PyTorch and beside LoRA with no mask.

    python benchmarks/cpu_kept.py --threads 2 --rank 8 --dtype float32

Forward and backward (gradients of x, A and B) of one linear at 1024 tokens with LLaMA2-7B's shapes. The variants of a
case are interleaved, round by round, in one process. The op's tests run first: where they fail nothing is timed.
Rows are appended to `benchmarks/results/cpu_kept.csv`.
"""

import argparse
import csv
import platform
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from atp_kernels import KeptSlice, kept_lora_linear, masked_lora_linear

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "cpu_kept.csv"
TOKENS = 1024
SHAPES = ((4096, 4096), (11008, 4096))  # out x in: q, k, v, o; gate and up
SIDES = ("out", "in", "both")
KEEP = 0.6
UNFUSED, ADDMM, MASKED, KEPT = "unfused", "addmm_no_mask", "masked_lora_linear", "kept_lora_linear"


def unfused(x: Tensor, weight: Tensor, lora_a: Tensor, lora_b: Tensor, masks: dict[str, Tensor]) -> Tensor:
    """The masked PEFT way: every operation on its own, by autograd."""
    base = (x * masks["in_mask"] if "in_mask" in masks else x) @ weight.T
    base = base * masks["out_mask"] if "out_mask" in masks else base
    return base + (x @ lora_a.T) @ lora_b.T


def steps(n_out: int, n_in: int, rank: int, dtype: torch.dtype, side: str) -> dict[str, Callable[[], None]]:
    """One forward and backward of every variant, on the same random operands."""
    rng = torch.Generator().manual_seed(0)
    x = torch.randn(TOKENS, n_in, generator=rng).to(dtype).requires_grad_()
    weight = torch.randn(n_out, n_in, generator=rng).div_(n_in**0.5).to(dtype)
    lora_a = torch.randn(rank, n_in, generator=rng).div_(n_in**0.5).to(dtype).requires_grad_()
    lora_b = torch.randn(n_out, rank, generator=rng).to(dtype).requires_grad_()
    grad = torch.randn(TOKENS, n_out, generator=rng).to(dtype)
    sides = {"out_mask": n_out, "in_mask": n_in}
    names = sides if side == "both" else [f"{side}_mask"]
    masks = {name: torch.rand(sides[name], generator=rng) < KEEP for name in names}
    kept = KeptSlice(weight, **masks)
    operands = (x, weight, lora_a, lora_b)
    forward = {
        UNFUSED: lambda: unfused(*operands, masks),
        ADDMM: lambda: masked_lora_linear(*operands, scaling=1.0),
        MASKED: lambda: masked_lora_linear(*operands, scaling=1.0, **masks),
        KEPT: lambda: kept_lora_linear(x, kept, lora_a, lora_b, scaling=1.0),
    }

    def step(call: Callable[[], Tensor]) -> None:
        torch.autograd.grad(call(), (x, lora_a, lora_b), grad)

    return {name: lambda call=call: step(call) for name, call in forward.items()}


def measure(variants: dict[str, Callable[[], None]], rounds: int) -> dict[str, list[float]]:
    """Sorted milliseconds of every variant; the first round warms up and is not counted."""
    times: dict[str, list[float]] = {name: [] for name in variants}
    for round_ in range(rounds + 1):
        for name, run in variants.items():
            start = time.perf_counter()
            run()
            if round_:
                times[name].append(1e3 * (time.perf_counter() - start))
    return {name: sorted(values) for name, values in times.items()}


def quantile(ordered: list[float], share: float) -> float:
    return ordered[round(share * (len(ordered) - 1))]


def environment(threads: int) -> dict[str, str | int]:
    cpu = Path("/proc/cpuinfo")
    lines = cpu.read_text().splitlines() if cpu.exists() else []
    device = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())
    git = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True)
    versions = {"python": platform.python_version(), "torch": torch.__version__}
    return {"device": device, "threads": threads, **versions, "commit": git.stdout.strip()}


def append(rows: list[dict]) -> None:
    RESULTS.parent.mkdir(exist_ok=True)
    new = not RESULTS.exists()
    with RESULTS.open("a", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, rows[0].keys())
        if new:
            writer.writeheader()
        writer.writerows(rows)


def verify() -> None:
    tests = ROOT / "tests" / "atp_kernels" / "test_kept.py"
    if subprocess.run([sys.executable, "-m", "pytest", "-q", str(tests)], cwd=ROOT).returncode:
        sys.exit("the op's tests fail: nothing is timed.")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--rank", type=int, nargs="+", default=[8, 16])
    parser.add_argument("--dtype", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--out", type=int, nargs="+", default=[n_out for n_out, _ in SHAPES])
    parser.add_argument("--side", nargs="+", default=SIDES, choices=SIDES)
    options = parser.parse_args()
    verify()
    torch.set_num_threads(options.threads)
    where = environment(options.threads)
    cases = [
        (n_out, n_in, rank, dtype, side)
        for dtype in options.dtype
        for n_out, n_in in SHAPES
        if n_out in options.out
        for rank in options.rank
        for side in options.side
    ]
    for n_out, n_in, rank, dtype, side in cases:
        times = measure(steps(n_out, n_in, rank, getattr(torch, dtype), side), options.rounds)
        middle = {name: quantile(ordered, 0.5) for name, ordered in times.items()}
        case = {"tokens": TOKENS, "out": n_out, "in": n_in, "rank": rank, "dtype": dtype, "side": side, "keep": KEEP}
        append([
            {
                **where, **case, "variant": name, "rounds": options.rounds,
                **{f"p{share}_ms": round(quantile(ordered, share / 100), 2) for share in (20, 50, 80)},
                "over_unfused": round(middle[UNFUSED] / middle[name], 3),
            }
            for name, ordered in times.items()
        ])  # fmt: skip
        shown = "  ".join(f"{name} {value:.1f}" for name, value in middle.items())
        against = f"{middle[UNFUSED] / middle[KEPT]:.2f}x unfused, {middle[ADDMM] / middle[KEPT]:.2f}x {ADDMM}"
        print(f"{n_out}x{n_in} r{rank} {dtype} {side}: {shown} ms -> {against}", flush=True)


if __name__ == "__main__":
    main()
