"""All scores of one model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from transformers import PretrainedConfig, PreTrainedTokenizerBase

from atp.data.examples import Example, values
from atp.data.tasks import Task
from atp.evaluation.generation import rouge_scores
from atp.evaluation.inference import CausalLM, Progress
from atp.evaluation.perplexity import ScoredWindows, perplexity
from atp.evaluation.tasks import check_labels, label_scores, query_lengths, tokenize_questions


def evaluate_model(
    model: CausalLM,
    tokenizer: PreTrainedTokenizerBase,
    windows: ScoredWindows,
    examples: Sequence[Example] = (),
    *,
    tasks: Sequence[Task] = (),
    batch_size: int = 8,
    max_windows: int | None = None,
    max_examples: int | None = None,
    max_length: int = 1024,
    seed: int = 0,
    autocast: torch.dtype | None = None,
    progress: Callable[[str], Progress] | None = None,
) -> dict[str, object]:
    """Perplexity over windows, and each task's score over its first `max_examples` examples.

    Works for any causal LM that takes `logits_to_keep`: stock, PEFT-wrapped, masked or cut. Prompts are cut to
    `max_length` tokens or the model's positions. progress: returns the progress callback of a named part.
    Returns the result of `perplexity`, and tasks: {name: the result of `label_scores` or `rouge_scores`}.
    """
    bar: Callable[[str], Progress | None] = progress or (lambda name: None)
    common: dict[str, Any] = {"seed": seed, "autocast": autocast}
    scores = perplexity(model, windows, batch_size, max_windows=max_windows, progress=bar("perplexity"), **common)
    common["max_length"] = _room(max_length, model.config)
    scored: dict[str, object] = {}
    for task in tasks:
        chosen = task_examples(examples, task)[:max_examples]
        common["progress"] = bar(task.name)
        if task.labels:
            scored[task.name] = label_scores(model, tokenizer, chosen, task.labels, batch_size, **common)
        else:
            scored[task.name] = rouge_scores(
                model, tokenizer, chosen, batch_size, max_new_tokens=task.max_new_tokens, **common
            )
    return {**scores, "tasks": scored}


def check_questions(
    tokenizer: PreTrainedTokenizerBase,
    shapes: PretrainedConfig,
    examples: Sequence[Example],
    tasks: Sequence[Task],
    *,
    max_examples: int | None = None,
    max_length: int = 1024,
) -> list[int]:
    """Raises the `InputError` that `evaluate_model` would raise for a question or its labels, without the model.

    shapes: the model's config. Returns the tokens of each sequence that it would run for questions with labels.
    """
    lengths: list[int] = []
    for task in tasks:
        if task.labels:
            chosen = task_examples(examples, task)[:max_examples]
            check_labels(chosen, task.labels)
            questions = tokenize_questions(tokenizer, chosen, task.labels, _room(max_length, shapes))
            lengths += query_lengths(questions)
    return lengths


def task_examples(examples: Sequence[Example], task: Task) -> list[Example]:
    """The examples that a task scores, in order."""
    return [examples[place] for place, name in enumerate(values(examples, "task")) if name == task.name]


def _room(max_length: int, shapes: PretrainedConfig) -> int:
    """Tokens of prompt and answer that the model takes; some families have no limit."""
    return min(max_length, getattr(shapes.get_text_config(), "max_position_embeddings", None) or max_length)
