"""Open, tune and refit steps of each family without experts, beside Llama's of the same sizes.

    python -m benchmarks.families --length 256
    python -m benchmarks.families gemma3_text olmo2

Each family runs in turns with a Llama in the same mask space. The mark is Llama's time over the family's. Exit status 1
if a mark is missed, unless --lenient. Rows are appended to RESULTS/families.csv.
"""

import argparse
import sys
from dataclasses import replace
from pathlib import Path

import torch

from atp.families import FAMILIES, ExpertFamily
from atp.lora.controller import MaskController
from atp.lora.layer import MaskedPeftLinear
from atp.removal import cut_model
from atp.removal.refit import refit
from atp.training.cross_entropy import held_heads
from benchmarks.case import Case, Variant
from benchmarks.gate import Mark, conclude
from benchmarks.measure import interleave, quantile, ratio
from benchmarks.records import RESULTS, append, environment
from benchmarks.shapes import Model
from benchmarks.steps import Scene

PLAIN = sorted(name for name, family in FAMILIES.items() if not isinstance(family, ExpertFamily) and name != "llama")
STEPS = ("open", "tune", "refit")
BOUND = 0.90


class Slice(Case):
    """A case with a few layers of its model and few words, so that the layers take the time."""

    @property
    def sizes(self) -> Model:
        whole = super().sizes
        return replace(whole, layers=min(whole.layers, 4), vocab=min(whole.vocab, 4096))


def refit_of(scene: Scene) -> Variant:
    """The refit of the model to one batch; each call fits the weights that the one before left."""
    model = scene.with_lora(MaskedPeftLinear).eval()
    controller = MaskController(model, scene.space)
    decoder = model.get_base_model().get_decoder()

    def fit() -> None:
        batch = {name: value for name, value in scene.batch.items() if name != "labels"}
        refit(decoder, controller, scene.space, scene.masks[0], [batch], damping=1.0)

    return Variant(fit, same=False, whole=True, holds=(model, controller))


def steps(case: Case, family: str) -> dict[str, Variant]:
    """The three steps of a family."""
    scene = Scene(case, family)
    cut = cut_model(scene.with_lora(MaskedPeftLinear), scene.space, scene.masks[0])
    return {
        "open": scene.open_step(observed=True),
        "tune": scene.lora_step(cut, scene.loss, same=False, flat=True),
        "refit": refit_of(scene),
    }


def compare(options: argparse.Namespace, family: str, dtype: str) -> list[dict[str, object]]:
    """A row a step: milliseconds of both, and Llama's over the family's, round by round."""
    case = Slice(
        "families", options.model, FAMILIES[family].space, options.batch * options.length, options.rank, dtype,
        length=options.length,
    )  # fmt: skip
    rows = []
    with held_heads():
        ours, llamas = steps(case, family), steps(case, "llama")
        for step in STEPS:
            variants = {family: ours[step], "llama": llamas[step]}
            for variant in variants.values():
                variant.prepare("full")()
            times = interleave(variants, "full", options.rounds, "cpu")
            rows.append({
                "family": family, "space": case.part, "step": step, "dtype": dtype, "tokens": case.tokens,
                "length": case.length, "ms": round(quantile(times[family], 0.5), 2),
                "llama_ms": round(quantile(times["llama"], 0.5), 2),
                "speed": round(ratio(times["llama"], times[family]), 3),
            })  # fmt: skip
    return rows


def main(arguments: list[str] | None = None) -> int:
    """Measures, prints the marks, and returns the exit status."""
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("families", nargs="*", default=PLAIN)
    options.add_argument("--model", default="smollm2-135m")
    options.add_argument("--batch", type=int, default=4)
    options.add_argument("--length", type=int, default=256)
    options.add_argument("--rank", type=int, default=8)
    options.add_argument("--dtype", nargs="+", default=["float32", "bfloat16"])
    options.add_argument("--rounds", type=int, default=9)
    options.add_argument("--threads", type=int, default=2)
    options.add_argument("--lenient", action="store_true", help="exit with 0 though a mark is missed")
    options.add_argument("--out", type=Path, default=RESULTS)
    chosen = options.parse_args(arguments)
    torch.set_num_threads(chosen.threads)
    where, marks = environment("cpu"), []
    for family in chosen.families:
        for dtype in chosen.dtype:
            rows = compare(chosen, family, dtype)
            append(chosen.out / "families.csv", [where | row for row in rows])
            found = [Mark(f"{family} {row['step']} {dtype}, {row['ms']} ms", row["speed"], BOUND) for row in rows]
            print(*found, sep="\n", flush=True)
            marks += found
    return conclude(marks) and not chosen.lenient


if __name__ == "__main__":
    sys.exit(main())
