"""The config of a run with every choice made that `ATPConfig` may leave open."""

from __future__ import annotations

import math
from typing import Any, Literal

from atp.config.config import ATPConfig, DecisionsConfig, DecisionSource
from atp.config.presets import by_length
from atp.config.training import FULL_LR, TrainingConfig

Definite = Literal["float32", "bfloat16"]

_ROUND = 0.6  # of what was there: the least that a round keeps by itself
# Validation: the share of a run's time that its scores may take, and how many forward passes a LoRA step is worth.
_SHARE, _PASSES = 0.05, 3


class ResolvedDecisions(DecisionsConfig, frozen=True):
    """The section `decisions`; every target is a target_keep here."""

    source: DecisionSource
    rounds: int


class ResolvedTraining(TrainingConfig, frozen=True):
    """The section `training`; minutes and tokens are steps here. lr, embeddings_lr and
    update_clipping wait for the data.

    tune stays null where it is what the other phases leave of steps, so that other steps may still be asked for.
    """

    open: int
    beta2: float
    precision: Definite


class ResolvedConfig(ATPConfig, frozen=True):
    """What a run computes with. `resolve` makes it once, before anything is trained; nobody changes it after that.

    A null means "none" here (no revision, no validation split), and no longer "whatever suits the run". Exceptions are
    training.tune, decisions.multiples (a rule that each structure applies to its width), and what a data recipe sets.
    """

    decisions: ResolvedDecisions
    training: ResolvedTraining


def decided(
    config: ATPConfig, precision: Definite, keep: float | None, steps: int | None, scored: float | None
) -> ResolvedConfig:
    """The config with each open choice made, from what was found out for it: see `atp.inputs.resolve.resolve`."""
    if steps is not None:
        config = at_length(config, steps)
    config.training.require_steps()
    decisions, training = _decisions(config, keep), _training(config.training, precision, scored)
    data, evaluation = config.data.model_dump(), config.evaluation.model_dump()
    if data["seed"] is None:
        data["seed"] = config.seed
    if evaluation["every"] is not None and evaluation["validation_windows"] is None:
        between = evaluation["every"] * training["batch_size"] * training["gradient_accumulation"]
        evaluation["validation_windows"] = max(1, round(_SHARE * _PASSES * between))
    made = {"decisions": decisions, "training": training, "data": data, "evaluation": evaluation}
    return ResolvedConfig.model_validate(config.model_dump() | made)


def at_length(config: ATPConfig, steps: int) -> ATPConfig:
    """The config with this number of LoRA steps in place of minutes or tokens, and what `preset: auto` is for them.

    Each phase keeps its share of the whole, and at least one step if it had any. Raises `pydantic.ValidationError`
    where so few steps do not hold all phases.
    """
    training = config.training
    factor = steps / training.total
    counts = {"open": training.open, "search": training.search, "settle": training.settle}
    given = {name: max(round(count * factor), 1) if count else count for name, count in counts.items()}
    if training.tune is not None:
        given["tune"] = max(steps - sum(count or 0 for count in given.values()), 0)
    else:
        given["steps"] = steps
    given |= dict.fromkeys(training.budget)
    TrainingConfig.model_validate(training.model_dump() | given)
    return by_length(config.model_copy(update={"training": training.model_copy(update=given)}))


def _training(training: TrainingConfig, precision: Definite, scored: float | None) -> dict[str, Any]:
    made: dict[str, Any] = {"steps": training.total, "open": training.opened}
    made |= {"beta2": training.second_moment, "precision": precision}
    if training.after_cut == "full" and training.full_lr is None:
        made["full_lr"] = FULL_LR
    if scored is not None:
        made |= {"lr": (rate := training.rate(scored)), "update_clipping": training.clips_updates(scored)}
        if training.embeddings and training.embeddings_lr is None:
            made["embeddings_lr"] = training.embeddings_rate(rate)
    return training.model_dump() | made


def _decisions(config: ATPConfig, keep: float | None) -> dict[str, Any]:
    """docs/method.md section 9 says why."""
    decisions, training = config.decisions, config.training
    source, rounds = decisions.source, decisions.rounds
    target = decisions.target_keep if keep is None else keep
    if decisions.path is not None:
        source, rounds = "static", 1
    if source is None:
        enough = training.opened_samples >= decisions.saliency_windows
        source = "running" if enough and not (training.search or config.lora.dropout) else "tuned"
    if rounds is None:
        text = source == "running" and config.data.packing != "padded"
        at_once = text and not training.search and decisions.refit_windows
        rounds = _rounds_to(target) if at_once else 1
    targets = {key: None for key in type(decisions).model_fields if key.startswith("target_")}
    return decisions.model_dump() | targets | {"target_keep": target, "source": source, "rounds": rounds}


def _rounds_to(target: float) -> int:
    """As few rounds as lead to a share, each of which keeps `_ROUND` of the one before or more."""
    return max(math.ceil(math.log(target) / math.log(_ROUND) - 1e-9), 1)
