"""The length of a run as minutes or tokens: the number of LoRA steps that it comes to, shared by the phases."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import ValidationError

from atp.config import ATPConfig, TrainingConfig
from atp.config.overrides import explain
from atp.config.presets import by_length, lengths_below
from atp.ground.environment import device_name
from atp.ground.errors import InputError
from atp.ground.files import read_json
from atp.inputs.folders import LENGTH
from atp.inputs.loading import load_shapes
from atp.processes import processes
from atp.training.precision import autocast_dtype

_LEAST = 10  # steps: a shorter run learns nothing
_PROBED = 1000  # steps of the run whose time is computed from the probe
_BESIDE = ("saliency", "refit", "certificate")  # what takes its time whatever the number of steps
_STEPS = ("open", "search", "settle", "tune", "validation")


def with_known_steps(config: ATPConfig) -> tuple[ATPConfig, dict[str, Any] | None]:
    """The config with the steps that its run folder says `training.minutes` or `training.tokens` came to.

    So a run resumes with the steps it was started with. The config as it is, and None, where the folder says nothing.
    """
    known = read_json(Path(config.output_dir) / LENGTH)
    asked, steps = ((known or {}).get(key) for key in ("asked", "steps"))
    if known is None or not config.training.budget or asked != config.training.budget or type(steps) is not int:
        return config, None
    return _at(config, steps), known


def with_steps(
    config: ATPConfig, sample: float, scored: float = 1.0, count: int | None = None, *, calibrated: float | None = None
) -> tuple[ATPConfig, dict[str, Any] | None]:
    """The config with steps in place of `training.minutes` or `training.tokens`, and a record of how they were found.

    Phases keep their shares of the whole. Tokens are those that all LoRA steps read. Minutes hold LoRA steps, saliency,
    refit, certificate and scores on the validation split, at the speed of a probe of a few layers (`atp.plan.probe`),
    which takes some seconds; loading, scores before and after, and export come on top. sample, calibrated: tokens of an
    average sample of the training and of the calibration data. scored: share of the former that have a loss. count: of
    processes, default that of now. None for a config without such a key. Raises `InputError` if it comes to fewer than
    10 steps.
    """
    known, record = with_known_steps(config)
    if record is not None or not config.training.budget:
        return known, record
    ((key, asked),) = config.training.budget.items()
    training = config.training
    per_step = training.batch_size * training.gradient_accumulation * (count or processes.count()) * sample
    if key == "tokens":
        steps, found = round(asked / per_step), f"{per_step:,.0f} tokens per step"
    else:
        steps, found = processes.on_main(lambda: _steps_in(60 * asked, config, sample, scored, calibrated))
    if steps < _LEAST:
        raise InputError(
            f"training.{key} is {asked:g}, which comes to {max(steps, 0)} steps ({found}): give more, for at least "
            f"{_LEAST} steps"
        )
    at = _at(config, steps)
    total = at.training.total
    record = {
        "asked": training.budget,
        "steps": total,
        "description": f"training.{key}={asked:g} comes to {total} steps ({found}), {total * per_step:,.0f} tokens",
    }
    return at, record


def _at(config: ATPConfig, steps: int) -> ATPConfig:
    """The config with this number of steps, of which each phase has the share that it had, and with what
    `preset: auto` stands for there."""
    training = config.training
    factor = steps / training.total
    counts = {"open": training.open, "search": training.search, "settle": training.settle}
    given = {name: max(round(count * factor), 1) if count else count for name, count in counts.items()}
    if training.tune is not None:
        given["tune"] = max(steps - sum(count or 0 for count in given.values()), 0)
    else:
        given["steps"] = steps
    given |= dict.fromkeys(training.budget)
    try:
        TrainingConfig.model_validate(training.model_dump() | given)
    except ValidationError as error:
        raise InputError(explain(error, TrainingConfig)) from None
    return by_length(config.model_copy(update={"training": training.model_copy(update=given)}))


def _steps_in(
    seconds: float, config: ATPConfig, sample: float, scored: float, calibrated: float | None = None
) -> tuple[int, str]:
    """The number of steps that fit, and how it was found."""
    steps = _PROBED
    for _ in range(2):  # again where so few steps choose another recipe, which takes another time
        at = _at(config, steps)
        fixed, each = _seconds(at, sample, scored, calibrated)
        steps = int((seconds - fixed) / each)
        if steps < _LEAST or _recipe(_at(config, steps)) == _recipe(at):
            break
    else:  # a little longer is another recipe, which takes more time than is left: as long as this one goes
        timed = _recipe(at)
        steps = next((each for each in lengths_below(steps) if _recipe(_at(config, each)) == timed), steps)
    beside = f"{fixed:.3g} s for saliency, refit and certificate"
    return steps, f"{each:.3g} s per step and {beside}, by a probe of {device_name()}"


def _recipe(config: ATPConfig) -> tuple[Any, ...]:
    """What the number of steps chooses, and what takes time."""
    return config.deciding.source, config.decisions.refit_windows, config.evaluation.every


def _seconds(at: ATPConfig, sample: float, scored: float, calibrated: float | None = None) -> tuple[float, float]:
    """Seconds of a run that do not depend on the number of its steps, and seconds per step."""
    # Inside the function, because the plan knows `atp.run`, which knows this module.
    from atp.plan.cost import cost_of
    from atp.plan.job import Workload
    from atp.plan.probe import flop_rates, seconds_of
    from atp.plan.shapes import ModelShapes

    shapes = ModelShapes.of(load_shapes(at.model), at.decisions)
    autocast, device = autocast_dtype(at.training.precision), processes.device().type
    job = Workload.of(at, shapes, autocast=autocast, device=device, sample=sample, calibrated=calibrated, scored=scored)
    speed = flop_rates(job)
    seconds = {row.phase: seconds_of(row, speed) for row in cost_of(job)}
    fixed, stepping = (sum(seconds.get(phase, 0.0) for phase in phases) for phases in (_BESIDE, _STEPS))
    return fixed, stepping / at.training.total
