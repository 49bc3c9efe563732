"""The run of a rival: another pretrained model, of any family, tuned whole for as long as ATP has trained."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from peft import PeftModel
from transformers import PretrainedConfig, PreTrainedModel

from atp.baselines.tuner import LoraTuner, stock_lora
from atp.config import ATPConfig, TrainingConfig
from atp.data import load_recipe
from atp.evaluation.scored_tasks import check_tasks
from atp.families import FAMILIES, UnsupportedModel, family_name, family_of
from atp.ground import heap, progress
from atp.inputs.loading import (
    RunData,
    check_length,
    check_packages,
    check_vocabulary,
    data_settings,
    load_any_model,
    load_shapes,
    load_tokenizer,
    refuse_quantized,
)
from atp.inputs.resolve import resolve
from atp.lora.layer import add_lora
from atp.processes import processes
from atp.processes.finite import refuse_weights
from atp.spaces.space import MaskSpace
from atp.studies.compare.baseline_run import BaselineRun
from atp.training.callbacks import Callback, Record
from atp.training.loop import Loop

_PROBED = 8  # steps, after a first one, by whose time the number of steps is chosen
_PLAIN = {"gradient_checkpointing": False, "cuda_graphs": False}  # what needs a known family


def rival_config(config: ATPConfig, model: str, seconds: float | None) -> ATPConfig:
    """The config of a comparison with another model in it, tuned from the first step to the last.

    seconds: that training takes; None for as many steps as the config has.
    """
    values = config.model_dump(mode="json")
    values["model"] = {"path": model, "dtype": config.model.dtype}
    values["vocabulary"] = {}
    keep = config.decisions.target_keep
    values["decisions"] = {"target_keep": keep, "source": "static", "saliency_windows": 1, "refit_windows": 0}
    default = TrainingConfig.model_fields["steps"].default
    values["training"] |= {"steps": default, "open": 0, "search": 0, "settle": 0, "tune": config.training.total}
    values["training"] |= {"after_cut": "lora", "embeddings": False, "full_lr": None, "embeddings_lr": None}
    if seconds is not None:
        values["training"] |= {"minutes": seconds / 60, "tune": 1}
    made = ATPConfig.parse(values)
    if family_name(load_shapes(made.model).model_type) not in FAMILIES:
        values["training"] |= _PLAIN
    return ATPConfig.parse(values)


def check_rival(config: ATPConfig) -> None:
    """Raises `InputError` for a model that cannot be tuned and scored on the data of a comparison."""
    check_packages(config.model, config.data)
    shapes, tokenizer = load_shapes(config.model), load_tokenizer(config.model)
    refuse_quantized(config.model, shapes)
    check_length(shapes, config.data.length)
    check_vocabulary(config.model, tokenizer)
    check_tasks(config, load_recipe(data_settings(config, tokenizer)), tokenizer, shapes)


class RivalRun(BaselineRun):
    """One run folder of a rival, whose tokenizer encodes the same documents.

    A family that can be cut trains in the layers that ATP trains in, another one in PEFT's own.
    """

    def __init__(self, name: str, config: ATPConfig, *, text: int | None, **options: Any) -> None:
        """text: bytes of the held-out text that the others are scored on. options: those of `Run`."""
        super().__init__(name, config, **options)
        self.text = text
        minutes = config.training.minutes
        self.facts["rival"] = {"seconds": None if minutes is None else 60 * minutes}

    def _load(self, config: ATPConfig) -> PreTrainedModel:
        model = load_any_model(config.model)
        refuse_weights(model)
        return model

    def _adapter_of(self, model: PreTrainedModel, config: ATPConfig) -> Callable[[PreTrainedModel], PeftModel]:
        try:
            space = MaskSpace.from_config(model.config, family_of(model.config).space)
        except UnsupportedModel:
            return partial(stock_lora, config=config)
        return partial(add_lora, space=space, **config.lora.model_dump(), seed=config.seed)

    def _measured_length(
        self, asked: ATPConfig, data: RunData, latency: dict[str, Any] | None, shapes: PretrainedConfig | None
    ) -> dict[str, Any] | None:
        """The steps that the time comes to, by the first ones of this model on its own samples."""
        if asked.training.minutes is None:
            return None
        seconds, each = 60 * asked.training.minutes, self._seconds_per_step(asked, data)
        steps = max(1, int(seconds / each))
        description = f"{seconds:,.0f} seconds, as long as ATP trained, come to {steps} steps of {each:.3g} s"
        return {"asked": asked.training.budget, "steps": steps, "description": f"{self.method}: {description}"}

    def _seconds_per_step(self, asked: ATPConfig, data: RunData) -> float:
        """Seconds of a step and of its share of validation, in all processes those of the first."""
        progress.begin("measuring steps")
        others: dict[str, Any] = {
            "minutes": None,
            "tune": 1 + _PROBED,
            "report_to": [],
            "metrics_file": None,
            "patience": None,
        }
        training = asked.training.model_copy(update=others)
        config = resolve(asked.model_copy(update={"training": training}), train=data.train)
        clock, every = _Clock(), config.evaluation.every
        with tempfile.TemporaryDirectory() as folder:
            model = self._load(config)
            wrapped = self._adapter_of(model, config)(model)
            tuner = LoraTuner(
                config, wrapped, data.train, Path(folder), validation=data.validation, callbacks=[clock]
            )  # fmt: skip
            tuner.inputs = {}  # nobody resumes this, so nothing is hashed
            tuner.train()
        each = (clock.read[-1] - clock.read[0]) / _PROBED
        if every:
            scored = sum(tuner.validation.due(step, 1 + _PROBED) for step in range(1, 2 + _PROBED))
            each += tuner.clock.seconds.get("validation", 0.0) / scored / every
        del tuner, wrapped, model
        heap.give_back()
        return processes.on_main(lambda: each)


class _Clock(Callback):
    """The seconds of training after each step."""

    def __init__(self) -> None:
        self.read: list[float] = []

    def on_step(self, loop: Loop, record: Record | None) -> None:
        self.read.append(loop.clock.seconds["tune"])
