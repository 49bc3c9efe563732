"""Budgets in the units that people have: a number of parameters or a size on disk, as a share of the decoder."""

from __future__ import annotations

import torch
from transformers import PretrainedConfig

from atp.config import ATPConfig, DecisionsConfig
from atp.decide.budget import Budget
from atp.ground.errors import InputError
from atp.inputs.loading import load_shapes, weights_dtype
from atp.spaces.space import MaskSpace

TIMED = ("target_prefill_ms", "target_decode_ms")


def share_of(config: ATPConfig, shapes: PretrainedConfig | None = None) -> float:
    """The share of the decoder that a target in shares, parameters or megabytes comes to, in (0, 1).

    shapes: the model's config, by default read from its config.json. Raises `InputError` for a target that embeddings,
    head and final norm alone exceed, or that the whole model does not reach; and for one in milliseconds, which has to
    be measured (`atp.plan.latency.measured_target`).
    """
    decisions = config.decisions
    for key in TIMED:
        if getattr(decisions, key) is not None:
            raise InputError(
                f"decisions.{key} is measured on the device by `atp train`, `atp sweep` and `atp plan` only: give here "
                "decisions.target_keep, the share that `atp plan` says it comes to"
            )
    if decisions.target_params is None and decisions.target_megabytes is None:
        return decisions.target_keep
    shapes = load_shapes(config.model) if shapes is None else shapes
    if decisions.target_params is not None:
        key, value, unit = "target_params", float(decisions.target_params), 1.0
    else:
        key, value = "target_megabytes", decisions.target_megabytes or 0.0
        unit = weights_dtype(config.model, shapes).itemsize / 1e6
    share, (least, most) = share_of_total(value / unit, shapes, decisions.space)
    if not 0 < share < 1:
        whole, fixed = _number(most * unit), _number(least * unit)
        raise InputError(
            f"decisions.{key} is {_number(value)}, but the model has {whole} and {fixed} of it are not in the decoder, "
            "where structures are removed: choose a number between"
        )
    return share


def in_shares(config: ATPConfig) -> ATPConfig:
    """The config that several runs are made from: its target as a share. Raises `InputError` as `share_of` does, and
    for a length that is not in steps."""
    config.training.require_steps()
    return at_share(config, share_of(config))


def at_share(config: ATPConfig, share: float) -> ATPConfig:
    """The config with decisions.target_keep set to `share`, in (0, 1), in place of any other target."""
    return at_target(config, "target_keep", share)


def at_target(config: ATPConfig, key: str, value: float) -> ATPConfig:
    """The config with one target, `decisions.KEY`, in place of any other."""
    others = {name: known for name, known in config.decisions.model_dump().items() if not name.startswith("target_")}
    return config.model_copy(update={"decisions": DecisionsConfig.model_validate(others | {key: value})})


def share_of_total(params: float, shapes: PretrainedConfig, space: str) -> tuple[float, tuple[int, int]]:
    """The share of the decoder to keep for a model of `params` parameters in all: (share, (least, most)).

    most: parameters of the whole model, tied ones once; least: those outside the decoder's layers.
    """
    from transformers import AutoModelForCausalLM  # seconds, which other targets do not take

    with torch.device("meta"):  # counts without memory
        total = sum(p.numel() for p in AutoModelForCausalLM.from_config(shapes).parameters())
    decoder = Budget(MaskSpace.from_config(shapes, space)).total
    return (params - (total - decoder)) / decoder, (total - decoder, total)


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"
