"""Checks before the first step: refuse what cannot work, report what falls short."""

from __future__ import annotations

from transformers import PretrainedConfig

from atp.config import ATPConfig
from atp.decide.budget import Budget
from atp.decide.reach import nearest_share
from atp.decide.rules import width_rules
from atp.errors import InputError, quote, shorten
from atp.loading import RunData, check_length
from atp.spaces.space import MaskSpace

BUDGET_TOLERANCE = 0.002  # largest gap between the target and the share kept, of the decoder


def check_reachable(config: ATPConfig, shapes: PretrainedConfig, tolerance: float = BUDGET_TOLERANCE) -> None:
    """Raises `InputError` for windows beyond the model's positions, and for a target that no mask can meet."""
    check_length(shapes, config.data.length)
    decisions = config.decisions
    budget = Budget(MaskSpace.from_config(shapes, decisions.space))
    multiples = width_rules(budget, decisions.target_keep, decisions.multiples)
    nearest = nearest_share(budget, decisions.target_keep, multiples)
    if not abs(nearest - decisions.target_keep) <= tolerance:
        coarse = {name: multiple for name, multiple in multiples.items() if multiple > 1}
        rules = f" with decisions.multiples {quote(coarse)}" if coarse else ""
        remedy = "choose that, or lower the multiples" if rules else "choose that"
        raise InputError(
            f"decisions.target_keep is {decisions.target_keep}, but the nearest share that whole structures of this "
            f"model can keep{rules} is {nearest:.4f}: {remedy}"
        )


def shortfalls(config: ATPConfig, data: RunData) -> list[str]:
    """One sentence per setting that asks for more than the data hold; the run continues with what there is."""
    evaluation, decisions = config.evaluation, config.decisions
    test = data.splits.test
    asked = [
        ("evaluation.windows", evaluation.windows, "test windows", len(data.test)),
        ("decisions.refit_windows", decisions.refit_windows, "calibration samples", len(data.calibration)),
    ]
    if decisions.init == "saliency":
        asked.append(
            ("decisions.saliency_windows", decisions.saliency_windows, "calibration samples", len(data.calibration))
        )
    for task in data.splits.tasks:
        if not (task.labels or evaluation.generate):
            continue  # free text is scored on demand
        held_out = sum(example.task == task.name for example in test)
        asked.append(("evaluation.questions", evaluation.questions, f"test examples of {task.name}", held_out))
    found = [
        f"{key} is {count}, but there are only {there} {what}" for key, count, what, there in asked if count > there
    ]
    unused = [label for label in config.data.labels if all(label != example.label for example in test)]
    if unused:
        found.append(f"no test example has the label {shorten(' or '.join(unused))} of data.labels")
    return found
