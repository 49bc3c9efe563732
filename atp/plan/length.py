"""The length of a run as minutes or tokens: the number of LoRA steps that it comes to, shared by the phases."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from transformers import PretrainedConfig

from atp.config import ATPConfig, ResolvedConfig
from atp.config.presets import lengths_below
from atp.ground.environment import device_name
from atp.ground.errors import InputError
from atp.inputs.loading import load_shapes
from atp.inputs.precision import autocast_dtype
from atp.inputs.resolve import resolve
from atp.plan.cost import cost_of
from atp.plan.job import Workload
from atp.plan.probe import flop_rates, seconds_of
from atp.plan.shapes import ModelShapes
from atp.processes import processes

_LEAST = 10  # steps: a shorter run learns nothing
_PROBED = 1000  # steps of the run whose time is computed from the probe
_BESIDE = ("saliency", "refit", "certificate")  # what takes its time whatever the number of steps
_STEPS = ("open", "search", "settle", "tune", "validation")


def measured_length(
    config: ATPConfig,
    sample: float,
    scored: float = 1.0,
    count: int | None = None,
    *,
    calibrated: float | None = None,
    latency: dict[str, Any] | None = None,
    shapes: PretrainedConfig | None = None,
) -> dict[str, Any] | None:
    """What `training.minutes` or `training.tokens` come to: {asked, steps, description}; None without such a key.

    Tokens are those that all LoRA steps read. Minutes hold LoRA steps, saliency,
    refit, certificate and scores on the validation split, at the speed of a probe of a few layers (`atp.plan.probe`),
    which takes some seconds; loading, scores before and after, and export come on top. sample, calibrated: tokens of an
    average sample of the training and of the calibration data. scored: share of the former that have a loss. count: of
    processes, default that of now. latency: as in `resolve`. shapes: the model's config, by default its own. Raises
    `InputError` if it comes to fewer than 10 steps.
    """
    training = config.training
    if not training.budget:
        return None
    ((key, asked),) = training.budget.items()
    per_step = training.batch_size * training.gradient_accumulation * (count or processes.count()) * sample
    at = partial(_at, config, latency)
    if key == "tokens":
        steps, found = round(asked / per_step), f"{per_step:,.0f} tokens per step"
    else:
        steps, found = processes.on_main(lambda: _steps_in(60 * asked, at, sample, scored, calibrated, shapes))
    if steps < _LEAST:
        raise InputError(
            f"training.{key} is {asked:g}, which comes to {max(steps, 0)} steps ({found}): give more, for at least "
            f"{_LEAST} steps"
        )
    total = at(steps).training.total
    description = f"training.{key}={asked:g} comes to {total} steps ({found}), {total * per_step:,.0f} tokens"
    return {"asked": training.budget, "steps": steps, "description": description}


def _at(config: ATPConfig, latency: dict[str, Any] | None, steps: int) -> ResolvedConfig:
    return resolve(config, latency=latency, steps=steps)


def _steps_in(
    seconds: float,
    at: Callable[[int], ResolvedConfig],
    sample: float,
    scored: float,
    calibrated: float | None = None,
    found: PretrainedConfig | None = None,
) -> tuple[int, str]:
    """The number of steps that fit, and how it was found. at: the config of a run with so many steps."""
    steps = _PROBED
    for _ in range(2):  # again where so few steps choose another recipe, which takes another time
        timed = at(steps)
        fixed, each = _seconds(timed, sample, scored, calibrated, found)
        steps = int((seconds - fixed) / each)
        if steps < _LEAST or _recipe(at(steps)) == _recipe(timed):
            break
    else:  # a little longer is another recipe, which takes more time than is left: as long as this one goes
        steps = next((each for each in lengths_below(steps) if _recipe(at(each)) == _recipe(timed)), steps)
    beside = f"{fixed:.3g} s for saliency, refit and certificate"
    return steps, f"{each:.3g} s per step and {beside}, by a probe of {device_name()}"


def _recipe(config: ResolvedConfig) -> tuple[Any, ...]:
    """What the number of steps chooses, and what takes time."""
    return config.decisions.source, config.decisions.refit_windows, config.evaluation.every


def _seconds(
    at: ResolvedConfig, sample: float, scored: float, calibrated: float | None = None,
    found: PretrainedConfig | None = None,
) -> tuple[float, float]:  # fmt: skip
    """Seconds of a run that do not depend on the number of its steps, and seconds per step."""
    shapes = ModelShapes.of(found or load_shapes(at.model), at.decisions)
    autocast, device = autocast_dtype(at.training.precision), processes.device().type
    job = Workload.of(at, shapes, autocast=autocast, device=device, sample=sample, calibrated=calibrated, scored=scored)
    speed = flop_rates(job)
    seconds = {row.phase: seconds_of(row, speed) for row in cost_of(job)}
    fixed, stepping = (sum(seconds.get(phase, 0.0) for phase in phases) for phases in (_BESIDE, _STEPS))
    return fixed, stepping / at.training.total
