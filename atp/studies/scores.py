"""Scores of models on the test data of a run."""

from __future__ import annotations

import json
from functools import cached_property
from hashlib import sha256
from typing import Any

import torch
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from atp.config import ATPConfig
from atp.data import Splits, load_recipe
from atp.evaluation import evaluate_model, packed_windows
from atp.evaluation.inference import bars
from atp.evaluation.perplexity import windows_of
from atp.evaluation.scored_tasks import check_tasks, scored_tasks
from atp.ground import progress
from atp.inputs.loading import check_length, data_settings, held_out, scored_text


class Scores:
    """Scores models of any tokenizer on the text and the questions that a run of this config scores."""

    def __init__(self, config: ATPConfig) -> None:
        self.config, self.text = config, scored_text(config)

    def splits(self, tokenizer: PreTrainedTokenizerBase) -> Splits:
        """The data as a model reads them, whose chat template conversations are written with."""
        return load_recipe(data_settings(self.config, tokenizer))

    def check(self, shapes: PretrainedConfig, tokenizer: PreTrainedTokenizerBase) -> None:
        """Raises `InputError` for a model of this config that cannot be scored."""
        check_length(shapes, self.config.data.length)
        check_tasks(self.config, self.splits(tokenizer), tokenizer, shapes)

    def of(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        name: str,
        autocast: torch.dtype | None = None,
    ) -> dict[str, Any]:
        """The result of `evaluate_model`. name: what is scored, for the progress bar."""
        config, settings, splits = self.config, self.config.evaluation, self.splits(tokenizer)
        windows = packed_windows(held_out(config, splits, tokenizer), tokenizer)
        with progress.Bars(transient=True) as display:
            return evaluate_model(
                model, tokenizer, windows, splits.test, tasks=scored_tasks(config, splits), seed=config.seed,
                batch_size=settings.batch_size, max_windows=windows_of(windows, self.text, settings.windows),
                max_examples=settings.questions, autocast=autocast, progress=bars(display, f"scoring {name}"),
            )  # fmt: skip

    @cached_property
    def fingerprint(self) -> str:
        """What the figures depend on beside the model: the data and how much of them is scored."""
        scored = {key: getattr(self.config.evaluation, key) for key in ("windows", "questions", "generate")}
        told = [scored, self.config.data.model_dump(mode="json"), self.config.seed, self.text]
        return sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()[:12]
