"""The config of a run is resolved once, before anything is trained, and read from its folder ever after."""

from __future__ import annotations

from typing import Any

from pydantic import ValidationError
from transformers import PretrainedConfig

from atp.config import ATPConfig, Definite, ResolvedConfig, TrainingConfig
from atp.config.overrides import explain
from atp.config.resolved import decided
from atp.data import scored_per_sample
from atp.ground.errors import InputError
from atp.inputs.precision import AUTO, of_device
from atp.inputs.targets import TIMED, in_shares, share_of
from atp.processes import processes


def resolve(
    config: ATPConfig,
    *,
    latency: dict[str, Any] | None = None,
    steps: int | None = None,
    train: Any = None,
    device: str | None = None,
    shapes: PretrainedConfig | None = None,
) -> ResolvedConfig:
    """The config with every choice made that it leaves open; a config that leaves none open stays as it is.

    latency: what `atp.plan.latency.measured_target` found for a target in milliseconds. steps: LoRA steps that
    training.minutes or training.tokens come to (`atp.plan.length`). train: the training samples, as `collate` takes
    them; without them training.lr and training.update_clipping may stay null, as they go by the tokens with a loss in a
    step of all processes. device: type of the device that trains, by default this process's. shapes: the model's
    config, by default read where a target in parameters or bytes needs it. Raises `InputError` for a target out of the
    model's reach, for a length that nobody has turned into steps, and for phases that do not fit.
    """
    precision = definite(config, device)
    keep = share_of(config, shapes) if latency is None else latency["target_keep"]
    training, scored = config.training, None
    if train is not None and (training.lr is None or training.update_clipping is None):
        rows = training.batch_size * training.gradient_accumulation * processes.count()
        scored = scored_per_sample(train) * rows
    try:
        return decided(config, precision, keep, steps, scored)
    except ValidationError as error:
        raise InputError(explain(error, TrainingConfig)) from None


def foreseen(config: ATPConfig) -> tuple[ATPConfig, list[str]]:
    """The config as far as it can be resolved without the data and without a measurement, and the keys left open."""
    training, decisions = config.training, config.decisions
    counted = ("target_params", "target_megabytes") if config.vocabulary.keep == "auto" else ()
    timed = [f"decisions.{key}" for key in (*TIMED, *counted) if getattr(decisions, key) is not None]
    length = [f"training.{key}" for key in training.budget]
    by_data = [f"training.{key}" for key in ("lr", "update_clipping") if getattr(training, key) is None]
    if not (timed or length):
        return resolve(config), by_data
    update = {"precision": definite(config)}
    return config.model_copy(update={"training": training.model_copy(update=update)}), [*timed, *length, *by_data]


def definite(config: ATPConfig, device: str | None = None) -> Definite:
    """The precision of the config, or of the device where the config leaves it open."""
    asked = config.training.precision
    return of_device(device or processes.device().type) if asked == AUTO else asked


def in_common(config: ATPConfig, precision: Definite | None = None) -> ATPConfig:
    """The config that several runs are made from, with one precision for all of them; each run resolves the rest.

    precision: that which these runs were started with. Raises `InputError` as `in_shares` does.
    """
    training = config.training.model_copy(update={"precision": precision or definite(config)})
    return in_shares(config).model_copy(update={"training": training})
