"""A model of a run on many GPUs: memory of a process, what a step exchanges, how long it takes. It measures no GPU.

    python -m benchmarks.model_processes                                     # one table
    python -m benchmarks.model_processes --model llama3-70b --processes 32 --tokens 4096

A row per model and number of processes, each on a GPU of its own. Memory and exchange are those of `atp plan --device
cuda --processes N`; computing is `benchmarks.model_step`'s. Weights are in bfloat16, and in shards where there is more
than one process. Exchanging takes what a process sends at the rate of the links. A step takes at least the longer of
both, where they overlap, and at most their sum.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from atp.config import ATPConfig
from atp.plan import make_plan
from benchmarks.layer_model import Step, kernels_of
from benchmarks.model_step import config_of, shapes_of, total
from benchmarks.rates import GPUS, find_rates
from benchmarks.shapes import MODELS

PER_NODE = 8  # GPUs
# Bytes per second that a GPU sends. Between nodes each ring of NCCL leaves a node through one of its eight cards, so
# that eight rings share what a GPU sends.
LINKS = {
    "a100": (300e9, 8 * 25e9, "NVLink 3, 8 x 200 Gb/s InfiniBand a node"),
    "h100": (450e9, 8 * 50e9, "NVLink 4, 8 x 400 Gb/s InfiniBand a node"),
    "h200": (450e9, 8 * 50e9, "NVLink 4, 8 x 400 Gb/s InfiniBand a node"),
}
CASES = (("llama3-8b", 1), ("llama3-8b", 8), ("llama3-70b", 8), ("llama3-70b", 64))
HEAD = (
    "model", "GPUs", "memory, while training", "at most", "in", "a step sends", "computing", "exchanging",
    "tokens per second",
)  # fmt: skip


@dataclass(frozen=True)
class Estimate:
    """What one process has: bytes at the peak of a LoRA step of the open phase and of all parts, the name of the latter
    part, bytes that it sends in such a step; seconds of computing and exchanging; tokens per second of all processes,
    at least and at most."""

    training: int
    most: int
    part: str
    sent: int
    computing: float
    exchanging: float
    rate: tuple[float, float]


def plan_of(model: str, count: int, options: argparse.Namespace) -> dict[str, Any]:
    """The plan of `atp plan` for one of `MODELS`, or a config.json or its folder, in so many processes."""
    with tempfile.TemporaryDirectory() as folder:
        values = config_of(model).to_dict() | {"architectures": ["LlamaForCausalLM"]}
        (Path(folder) / "config.json").write_text(json.dumps(values, default=str), encoding="utf-8")
        config = {
            "model": {"path": folder, "dtype": "bfloat16"},
            "output_dir": "unused",
            "data": {"length": options.length},
            "decisions": {"target_keep": options.keep, "space": "kv_group"},
            "lora": {"r": options.rank},
            "training": {
                "batch_size": options.tokens // options.length,
                "gradient_checkpointing": options.checkpointing,
                "sharding": "fsdp" if count > 1 else None,
            },
            "evaluation": {"dense_baseline": False},
        }
        return make_plan(ATPConfig.parse(config), count=count, device="cuda")


def estimate(model: str, count: int, options: argparse.Namespace) -> Estimate:
    """A step of the open phase: the whole model, its adapter and its saliency."""
    plan, rates = plan_of(model, count, options), find_rates(options.gpu, torch.bfloat16)
    memory = {row["phase"]: row["bytes"] for row in plan["memory"]}
    part = max(memory, key=lambda phase: memory[phase])
    sent = next((row["sent"] for row in plan["exchange"] if row["phase"] == "open"), 0)
    shapes = shapes_of(model, options.keep, options.gpu)
    step = kernels_of(Step(shapes, options.tokens, options.length, options.rank, 2, "open", "ours", sharded=count > 1))
    computing = total(step, rates).seconds
    if options.checkpointing:
        computing *= 1.5  # frozen weights are multiplied once forward and once backward, and then once more
    inside, outside, _ = LINKS[options.gpu]
    exchanging = sent / (inside if count <= PER_NODE else min(inside, outside))
    tokens = count * options.tokens
    slowest, quickest = computing + exchanging, max(computing, exchanging)
    return Estimate(memory["open"], memory[part], part, sent, computing, exchanging,
                    (tokens / slowest, tokens / quickest))  # fmt: skip


def row(model: str, count: int, found: Estimate) -> str:
    """A row of the table, in Markdown."""
    low, high = found.rate
    rate = f"{low:,.0f}" if round(low) == round(high) else f"{low:,.0f} to {high:,.0f}"
    cells = (
        Path(model).name, str(count), f"{found.training / 1e9:.1f} GB", f"{found.most / 1e9:.1f} GB", found.part,
        f"{found.sent / 1e9:.2f} GB", f"{found.computing:.2f} s", f"{found.exchanging:.2f} s", rate,
    )  # fmt: skip
    return f"| {' | '.join(cells)} |"


def parser() -> argparse.ArgumentParser:
    """Options of the script."""
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--model", help=f"{', '.join(MODELS)}, or a config.json; default: the cases of the table")
    options.add_argument("--processes", type=int, default=8)
    options.add_argument("--tokens", type=int, default=2048, help="of a batch of one process")
    options.add_argument("--length", type=int, default=2048, help="tokens of a window")
    options.add_argument("--keep", type=float, default=0.6, help="share of the decoder that stays")
    options.add_argument("--rank", type=int, default=16)
    options.add_argument("--checkpointing", action="store_true", help="training.gradient_checkpointing")
    options.add_argument("--gpu", default="h100", choices=tuple(GPUS))
    return options


def main(arguments: list[str] | None = None) -> int:
    """Prints the table and returns the exit status."""
    options = parser().parse_args(arguments)
    options.length = min(options.length, options.tokens)
    if options.processes < 1 or options.tokens % options.length:
        print("give at least one process, and tokens that are whole windows of --length", file=sys.stderr)
        return 2
    rates, links = find_rates(options.gpu, torch.bfloat16), LINKS[options.gpu]
    cases = CASES if options.model is None else ((options.model, options.processes),)
    try:
        rows = [row(model, count, estimate(model, count, options)) for model, count in cases]
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    print(
        f"Peak rates, not a measurement. {rates.name}: {rates.source}; {links[2]}, {links[0] / 1e9:.0f} and "
        f"{links[1] / 1e9:.0f} GB/s.\n"
    )
    print(f"| {' | '.join(HEAD)} |", f"|{'---|' * len(HEAD)}", *rows, sep="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
