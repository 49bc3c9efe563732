"""A model of a training step: bytes, operations, launches and time of its kernels. It measures no GPU.

    python -m benchmarks.model_step --model llama2-7b --tokens 8192 --keep 0.6 --gpu h100
    python -m benchmarks.model_step --model path/to/config.json --gpu h200
    python -m benchmarks.model_step --model smollm2-layer --tokens 2048 --length 512 --gpu cpu --compare

A kernel takes the longer of computing and moving at the device's peak rates, and its launches; attention on a CPU has
a rate of its own. `ours` is the step as the trainer takes it on CUDA, `unfused` masks and LoRA in plain PyTorch
operations, `dense` LoRA on the whole model by the addmm idiom with norms, SwiGLU and RoPE fused. --compare times real
steps on this CPU, ratio by ratio.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import torch
from transformers import AutoConfig, LlamaConfig, PretrainedConfig

from atp.config import DecisionsConfig, TrainingConfig
from atp.decide.budget import Budget
from atp.decide.rules import width_rules
from atp.plan.shapes import ModelShapes
from atp.spaces.space import MaskSpace
from benchmarks.layer_model import PHASES, ROWS, WAYS, Kernel, Step, kernels_of
from benchmarks.rates import GPUS, Rates, find_rates
from benchmarks.shapes import MODELS, find_model

RATIOS = {
    "decision, ours over unfused": (("decision", "ours"), ("decision", "unfused")),
    "search, ours over unfused": (("search", "ours"), ("search", "unfused")),
    "cut over whole": (("tune", "ours"), ("tune", "ours whole")),
}


class Total(NamedTuple):
    """Sums over kernels; seconds as in `seconds`."""

    flops: float
    bytes: float
    launches: int
    seconds: float


def seconds(kernel: Kernel, rates: Rates) -> float:
    """The longer of computing and moving, and all launches."""
    flops = rates.attention if kernel.row == "attention" else rates.flops
    return max(kernel.flops / flops, kernel.bytes / rates.bandwidth) + kernel.launches * rates.launch


def total(kernels: Iterable[Kernel], rates: Rates) -> Total:
    """What some kernels come to."""
    found = list(kernels)
    return Total(
        sum(k.flops for k in found), sum(k.bytes for k in found), sum(k.launches for k in found),
        sum(seconds(k, rates) for k in found),
    )  # fmt: skip


def config_of(name: str) -> PretrainedConfig:
    """The config of a model in `benchmarks.shapes`, or of a config.json or its folder; ValueError for neither."""
    if Path(name).exists():
        return AutoConfig.from_pretrained(name)
    sizes = find_model(name)
    return LlamaConfig(
        vocab_size=sizes.vocab, hidden_size=sizes.hidden, intermediate_size=sizes.inner, head_dim=sizes.head_dim,
        num_hidden_layers=sizes.layers, num_attention_heads=sizes.heads, num_key_value_heads=sizes.kv_heads,
        tie_word_embeddings=sizes.tied,
    )  # fmt: skip


def shapes_of(name: str, keep: float, device: str) -> ModelShapes:
    """The shapes of a model whole and cut, in space `kv_group`, with the default widths of a device."""
    config = config_of(name)
    budget = Budget(MaskSpace.from_config(config, "kv_group"))
    multiples = width_rules(budget, keep, None, "cpu" if device == "cpu" else "cuda")
    return ModelShapes.of(config, DecisionsConfig(space="kv_group", target_keep=keep, multiples=multiples))


def table(step: dict[str, Step], rates: Rates) -> list[str]:
    """One phase: a line per row of `ROWS` and their sum, for each way GFLOP, GB, launches and milliseconds."""
    ways = {way: kernels_of(each) for way, each in step.items()}
    lines = [f"{'':<18}" + "".join(f"{way:^40}" for way in ways)]
    lines.append(f"{'':<18}" + "".join(f"{'GFLOP':>11}{'GB':>9}{'launches':>10}{'ms':>10}" for _ in ways))
    for row in (*ROWS, "all"):
        cells = [total((k for k in kernels if row in (k.row, "all")), rates) for kernels in ways.values()]
        lines.append(
            f"{row:<18}"
            + "".join(
                f"{c.flops / 1e9:>11,.0f}{c.bytes / 1e9:>9,.1f}{c.launches:>10,}{1e3 * c.seconds:>10,.1f}"
                for c in cells
            )
        )
    return lines


def steps(shapes: ModelShapes, options: argparse.Namespace, phase: str) -> dict[str, Step]:
    """The step of a phase in every way."""
    common = (shapes, options.tokens, options.length, options.rank, 4 if options.gpu == "cpu" else 2, phase)
    return {way: Step(*common, way, options.gpu != "cpu") for way in WAYS}


def predicted(shapes: ModelShapes, options: argparse.Namespace, rates: Rates) -> dict[str, float]:
    """The ratios of `RATIOS` in this model; `ours whole` is our tune step on the whole model."""
    time = {(phase, way): total(kernels_of(step), rates).seconds
            for phase in PHASES for way, step in steps(shapes, options, phase).items()}  # fmt: skip
    time["tune", "ours whole"] = total(kernels_of(steps(shapes, options, "whole")["ours"]), rates).seconds
    return {name: time[above] / time[below] for name, (above, below) in RATIOS.items()}


def of_a_run(shapes: ModelShapes, options: argparse.Namespace, rates: Rates) -> dict[str, float]:
    """Mean seconds of a LoRA step of the default recipe in every way: open steps, then those after the cut.

    Its decisions come from the open steps and the weights that they leave, so it takes no decision step.
    """
    training = TrainingConfig()
    opened = training.opened / training.total
    open_, tune = (
        {way: total(kernels_of(step), rates).seconds for way, step in steps(shapes, options, phase).items()}
        for phase in ("open", "tune")
    )
    return {way: opened * open_[way] + (1 - opened) * tune[way] for way in WAYS}


def compare(options: argparse.Namespace, rates: Rates) -> list[str]:
    """Ratios of this model beside those of real steps, in float32 on this CPU, medians of interleaved rounds."""
    from benchmarks.model_step_measured import measured  # steps of the product, which are slow to import

    model = predicted(shapes_of(options.model, options.keep, "cpu"), options, rates)
    found = measured(options)
    lines = [f"{'':<30}{'model':>8}{'measured':>10}{'model / measured':>18}"]
    for name in RATIOS:
        lines.append(f"{name:<30}{model[name]:>8.2f}{found[name]:>10.2f}{model[name] / found[name]:>18.2f}")
    return lines


def parser() -> argparse.ArgumentParser:
    """Options of the script."""
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--model", default="llama2-7b", help=f"{', '.join(MODELS)}, or a config.json")
    options.add_argument("--tokens", type=int, default=8192, help="of a step")
    options.add_argument("--length", type=int, default=2048, help="tokens of a window")
    options.add_argument("--keep", type=float, default=0.6, help="share of the decoder that stays")
    options.add_argument("--rank", type=int, default=16)
    options.add_argument("--gpu", default="h100", choices=(*GPUS, "cpu"))
    options.add_argument("--compare", action="store_true", help="with --gpu cpu: time real steps too")
    options.add_argument("--rounds", type=int, default=5)
    return options


def main(arguments: list[str] | None = None) -> int:
    """Prints the tables and returns the exit status."""
    options = parser().parse_args(arguments)
    if min(options.tokens, options.length, options.rank, options.rounds) < 1 or not 0 < options.keep < 1:
        print("give whole --tokens, --length, --rank and --rounds from 1, and --keep between 0 and 1", file=sys.stderr)
        return 2
    options.length = min(options.length, options.tokens)
    if options.compare and options.gpu != "cpu":
        print("--compare times this machine's CPU: give --gpu cpu", file=sys.stderr)
        return 2
    try:
        shapes = shapes_of(options.model, options.keep, options.gpu)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    rates = find_rates(options.gpu, torch.float32)
    print(
        f"A model at peak rates, not a measurement. {rates.name}: {rates.flops / 1e12:.3g} TFLOP/s, "
        f"{rates.attention / 1e12:.3g} in attention, {rates.bandwidth / 1e12:.3g} TB/s ({rates.source}), "
        f"{1e6 * rates.launch:.3g} us per launch (assumed on GPUs)."
    )
    kept = ", ".join(f"{name} {counts[0]}" for name, counts in shapes.counts.items())
    print(f"{options.model}, {options.tokens} tokens, rank {options.rank}, {shapes.share:.1%} kept ({kept} a layer).")
    for phase in PHASES:
        print(f"\n{phase}", *table(steps(shapes, options, phase), rates), sep="\n")
    run = of_a_run(shapes, options, rates)
    print("\ndefault recipe, mean of its steps: " + ", ".join(f"{way} {1e3 * run[way]:,.1f} ms" for way in WAYS))
    if options.compare:
        print("\nratios of seconds", *compare(options, rates), sep="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
