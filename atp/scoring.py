"""`atp eval`: scores of a model folder on a suite."""

from __future__ import annotations

from typing import Any

import torch

from atp.config import ModelConfig
from atp.data import DataSettings, load_recipe, pack, read_examples
from atp.data.recipes import RECIPES
from atp.evaluation import evaluate_model, model_size, throughput
from atp.loading import load_any_model, load_tokenizer
from atp.training.precision import autocast_dtype


def score_folder(
    model: str, suite: str, *, gguf_file: str | None, windows: int, length: int, questions: int
) -> dict[str, Any]:
    """Perplexity, answers, size and speed of a model as one flat dict.

    suite: a recipe name, whose test split is used, or a .jsonl or .csv file that is test data as a whole.
    """
    source = ModelConfig(path=model, gguf_file=gguf_file)
    tokenizer = load_tokenizer(source)
    if suite in RECIPES and suite != "custom":
        splits = load_recipe(DataSettings(recipe=suite, general_share=0.0))
        test, labels = splits.test, splits.labels
    else:
        test, labels = read_examples(suite), ()
    loaded, autocast = load_any_model(source), autocast_dtype("auto")
    scores = evaluate_model(
        loaded, tokenizer, pack(test, tokenizer, length), test,
        labels=labels if questions else (), max_windows=windows, max_examples=questions, autocast=autocast,
    )  # fmt: skip
    answers = scores.pop("qa", {})
    scores |= {name: answers[name] for name in ("accuracy", "macro_f1", "n") if name in answers}
    return scores | model_size(loaded, torch.float32) | throughput(loaded, autocast=autocast)
