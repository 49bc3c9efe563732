"""The tasks that a run scores, and what is known of their scores beforehand."""

from __future__ import annotations

from typing import Any

from transformers import PretrainedConfig, PreTrainedTokenizerBase

from atp.config import ATPConfig
from atp.data import Splits, Task
from atp.evaluation.generation import check_rouge
from atp.evaluation.majority import majority_scores
from atp.evaluation.suite import check_questions


def check_tasks(
    config: ATPConfig, splits: Splits, tokenizer: PreTrainedTokenizerBase, shapes: PretrainedConfig
) -> list[int]:
    """Raises `InputError` for questions that cannot be scored, before anything is written.

    Returns the tokens of each sequence that the questions with labels take.
    """
    tasks = scored_tasks(config, splits)
    if any(not task.labels for task in tasks):
        check_rouge()
    return check_questions(tokenizer, shapes, splits.test, tasks, max_examples=config.evaluation.questions)


def scored_tasks(config: ATPConfig, splits: Splits) -> list[Task]:
    """The tasks that a run scores."""
    settings = config.evaluation
    return [task for task in splits.tasks if settings.questions and (task.labels or settings.generate)]


def majority_of(config: ATPConfig, splits: Splits) -> dict[str, dict[str, Any]]:
    """The scores of the majority label on the questions that a run scores."""
    settings = config.evaluation
    return majority_scores(
        splits.train, splits.test, scored_tasks(config, splits), max_examples=settings.questions, seed=config.seed
    )


def without_items(scores: dict[str, Any]) -> dict[str, Any]:
    """The aggregate scores; those of single items stay in evaluation.json."""
    return {key: value for key, value in scores.items() if key != "items"}
