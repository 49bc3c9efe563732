"""The figures of a run's certificate, measured at the freeze, at the cut and after the export."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from torch import Tensor

from atp.evaluation.inference import CausalLM
from atp.ground.errors import NotReached
from atp.ground.files import write_json
from atp.lora.controller import MaskController
from atp.removal import check_certificate, compare, reference_logits
from atp.removal.certify import AT_CUT, LIMITS, USUAL_ROUNDING, WORDS_CUT, dtype_name


def masked_logits(model: CausalLM, controller: MaskController, mask: Tensor, tokens: Tensor) -> Tensor:
    """Logits of the model as LoRA steps see it under a hard mask, float32 [windows, tokens, vocab] on the CPU."""
    with controller.masks(mask, "base"):
        return reference_logits(model, tokens)


def at_freeze(
    reference: Tensor, model: CausalLM, controller: MaskController, mask: Tensor, tokens: Tensor
) -> dict[str, Any]:
    """How far a cut would move logits before removed LoRA groups are settled: what settling is for.

    reference: `masked_logits`. Raises `NotReached` for logits that are not finite.
    """
    with controller.masks(mask, "sum"):
        gap = compare(reference, model, tokens)
    if not math.isfinite(gap.relative):
        raise NotReached(
            "the masked model gives NaN or infinity on calibration windows at the freeze: start again with a lower "
            "learning rate, or with model.dtype=float32 and training.precision=float32"
        )
    return {"frozen_vs_cut": gap.relative}


def at_cut(reference: Tensor, model: CausalLM, tokens: Tensor, removed_lora_norm: float) -> dict[str, Any]:
    """What the cut changed. Raises `NotReached` if it changed the logits: tuning that model would be pointless.

    reference: `masked_logits` from before the cut.
    """
    gap = compare(reference, model, tokens)
    found = {
        "removed_lora_norm": removed_lora_norm,
        "masked_vs_cut": gap.relative,
        "masked_vs_cut_absolute": gap.absolute,
        "dtype": dtype_name(model),
    }
    check_certificate(found, AT_CUT)
    return found


def write_certificate(path: Path, certificate: dict[str, Any], tokens: Tensor) -> dict[str, Any]:
    """Writes the figures with their limits, the dtype of the weights and that of the comparison; returns all of it."""
    limits = LIMITS | ({WORDS_CUT: 0.0} if WORDS_CUT in certificate else {})
    usual = {"rounding_gap_usually_below": USUAL_ROUNDING[certificate["dtype"]]}
    written = certificate | {"tokens": tokens.numel(), "computed_in": "float32", "limits": limits} | usual
    write_json(path, written)
    return written
