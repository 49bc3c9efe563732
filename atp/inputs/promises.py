"""What a run promises: it is refused before the run if it cannot be kept, and checked after it."""

from __future__ import annotations

from typing import Any

from transformers import PretrainedConfig

from atp.config import ATPConfig
from atp.ground.errors import NotReached
from atp.inputs.checks import BUDGET_TOLERANCE, check_reachable
from atp.processes.finite import non_finite_figures
from atp.removal.certify import AT_CUT, AT_EXPORT, check_certificate


def check_target(config: ATPConfig, shapes: PretrainedConfig) -> None:
    """Refuses now what `check_promises` would certainly refuse after the run; shapes: the config of the model."""
    check_reachable(config, shapes, BUDGET_TOLERANCE)


def check_promises(summary: dict[str, Any]) -> None:
    """Raises `NotReached` if the budget or the certificate is missed, or a figure is not a number.

    Everything was written by then. Conditions say what must hold, not what must not: NaN then never passes.
    """
    check_certificate(summary["certificate"], AT_CUT + AT_EXPORT)
    check_figures(summary)
    missed = abs(summary["keep_decoder"] - summary["target_keep"])
    if not missed <= max(BUDGET_TOLERANCE, summary.get("rounding", 0.0)):
        raise NotReached(
            f"budget: {summary['keep_decoder']:.4f} of the decoder is kept, target {summary['target_keep']}: the "
            "width rules (decisions.multiples) are too coarse for this model, lower them"
        )


def check_figures(summary: dict[str, Any]) -> None:
    """Raises `NotReached` for the first figure that is NaN or infinite."""
    for figure, value in non_finite_figures(summary):
        raise NotReached(f"{figure} of summary.json is {value}, which is no result: check the model that it is of")
