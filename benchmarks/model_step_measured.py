"""The ratios that `benchmarks.model_step` predicts, measured on this CPU with the product's own steps."""

from __future__ import annotations

import argparse

from atp.lora.layer import MaskedPeftLinear
from atp.removal import cut_model
from benchmarks.case import Case
from benchmarks.measure import interleave, ratio
from benchmarks.steps import Scene, UnfusedMaskedLinear, decision


def measured(options: argparse.Namespace) -> dict[str, float]:
    """Ratios of seconds by their names in `model_step.RATIOS`; a decision step includes generator and budget."""
    case = Case(
        "model_step", options.model, "kv_group", options.tokens, options.rank, "float32", keep=options.keep,
        length=options.length,
    )  # fmt: skip
    scene = Scene(case)
    cut = cut_model(scene.with_lora(MaskedPeftLinear), scene.space, scene.masks[0])
    deciding = decision(case)
    variants = {
        "decision, ours": deciding["ours"],
        "decision, unfused": deciding["unfused"],
        "search, ours": scene.masked_step(MaskedPeftLinear, scene.masks[:1]),
        "search, unfused": scene.masked_step(UnfusedMaskedLinear, scene.masks[:1]),
        "cut": scene.lora_step(cut, scene.loss),
        "whole": scene.lora_step(scene.with_lora(MaskedPeftLinear), scene.loss),
    }
    for variant in variants.values():
        variant.prepare("full")()  # the first call gathers and fills caches
    times = interleave(variants, "full", options.rounds, "cpu")
    return {
        "decision, ours over unfused": ratio(times["decision, ours"], times["decision, unfused"]),
        "search, ours over unfused": ratio(times["search, ours"], times["search, unfused"]),
        "cut over whole": ratio(times["cut"], times["whole"]),
    }
