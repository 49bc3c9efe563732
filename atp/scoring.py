"""`atp eval`: scores of a model folder on a suite."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from transformers import PreTrainedTokenizerBase

from atp import progress
from atp.config import ATPConfig, DataConfig, ModelConfig
from atp.data import DataSettings, Example, Task, chat_of, load_recipe, read_examples, tasks_of
from atp.data.recipes import RECIPES
from atp.errors import InputError, is_out_of_memory, reason, shorten
from atp.evaluation import evaluate_model, model_size, relative_performance, sliding_windows, throughput
from atp.evaluation.generation import check_rouge
from atp.evaluation.harness import check_harness, harness_scores
from atp.evaluation.inference import bars
from atp.evaluation.majority import majority_scores
from atp.evaluation.suite import check_questions, task_examples
from atp.loading import (
    check_length,
    check_packages,
    check_vocabulary,
    data_settings,
    load_any_model,
    load_shapes,
    load_tokenizer,
    placed,
)
from atp.overrides import explain
from atp.reading import parse_json
from atp.report.beside import remarks
from atp.training.precision import Precision, autocast_dtype, precision_at


@dataclass(frozen=True)
class Scoring:
    """Options of `score_folder`.

    suite: a recipe or a run's config.yaml, whose test split is used; or a file of test data (docs/data.md).
    labels: answer set of such a file.
    documents: examples for perplexity, in windows of `length` tokens, `stride` tokens apart (default half a window).
    questions: examples per task; 0 for none. seed: of the split and of the bootstrap.
    dense: file with the scores of the tuned dense model, for relative performance.
    """

    suite: str = "health-mini"
    labels: tuple[str, ...] = ()
    documents: int = 60
    length: int = 512
    stride: int | None = None
    questions: int = 100
    batch_size: int = 8
    precision: Precision = "auto"
    seed: int = 0
    harness: bool = False
    dense: str | None = None


def score_folder(model: str, options: Scoring, gguf_file: str | None = None) -> dict[str, Any]:
    """Perplexity, answers, size and speed of a model: the result of `evaluate_model`, with its settings.

    Raises `InputError` for a wrong model, suite or option before the model runs, and when memory runs out.
    """
    try:
        return _score_folder(model, options, gguf_file)
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        less = [f"--batch-size {options.batch_size // 2}"] if options.batch_size > 1 else []
        less += [f"--length {options.length // 2}"] if options.length > 3 else []
        remedy = f"use {' or '.join(less)}" if less else "use a machine with more memory"
        raise InputError(f"out of memory ({reason(error)}): {remedy}") from error


def _score_folder(model: str, options: Scoring, gguf_file: str | None) -> dict[str, Any]:
    try:
        source = ModelConfig(path=model, gguf_file=gguf_file)
    except ValidationError as error:
        raise InputError(f"the model: {explain(error, ModelConfig)}") from None
    check_packages(source, _data_of(options.suite))
    tokenizer = load_tokenizer(source)
    check_vocabulary(source, tokenizer)
    shapes = load_shapes(source)
    check_length(shapes, options.length, "--length")
    progress.begin("reading the data")
    train, examples, tasks = _load_suite(options, tokenizer)
    # Plain text if the recipe holds some out for this, else everything that is held out.
    texts = [example for example in examples if not example.completion] or examples
    windows = sliding_windows(texts[: options.documents], tokenizer, options.length, options.stride)
    tasks = tasks if options.questions else ()
    check_questions(tokenizer, shapes, examples, tasks, max_examples=options.questions)
    majority = majority_scores(train, examples, tasks, max_examples=options.questions, seed=options.seed)
    dense = _read_scores(Path(options.dense), tasks, majority) if options.dense else None
    if any(not task.labels for task in tasks):
        check_rouge()
    if options.harness:
        check_harness()
    progress.begin("loading")
    precision = precision_at(options.precision, model, options.suite)
    loaded, autocast = placed(load_any_model(source)), autocast_dtype(precision)
    common: dict[str, Any] = {"batch_size": options.batch_size, "max_examples": options.questions, "autocast": autocast}
    with progress.Bars(transient=True) as display:
        scores: dict[str, Any] = evaluate_model(
            loaded, tokenizer, windows, examples, tasks=tasks, seed=options.seed, progress=bars(display, "scoring"),
            **common,
        )  # fmt: skip
    if options.harness:
        progress.begin("scoring with lm-eval")
        theirs = harness_scores(loaded, tokenizer, examples, tasks, **common)
        scores["harness"] = {
            name: result | _agreement(scores["tasks"][name], result) for name, result in theirs.items()
        }
    scores["majority"] = majority
    if dense is not None:
        scores |= relative_performance(scores, dense, tasks, majority, options.seed)
    progress.begin("speed")
    return {
        "model": model, **scores, **model_size(loaded), **throughput(loaded),
        "settings": asdict(options) | {"precision": precision}, 
        "remarks": [*_shortfalls(options, texts, examples, tasks), *remarks(scores)],
    }  # fmt: skip


def flat_scores(scores: dict[str, Any], prefix: str = "") -> list[tuple[str, Any, list[float] | None]]:
    """(name, value, 95 % interval or None) of every figure; those of a task start with its name.

    A relative figure that is not measurable has the value None.
    """
    rows = []
    for name, value in scores.items():
        if isinstance(value, dict) and name not in ("confusion", "settings"):
            rows += flat_scores(value, prefix if name == "tasks" else f"{prefix}{name} ")
        elif isinstance(value, (int, float)) or (value is None and not name.endswith("_interval")):
            rows.append((prefix + name, value, scores.get(f"{name}_interval")))
    return rows


def _data_of(suite: str) -> DataConfig:
    """The data settings behind a suite."""
    if suite.endswith((".yaml", ".yml")):
        return ATPConfig.load(suite).data
    return DataConfig(recipe=suite if suite in RECIPES else "custom", general_share=0.0)


def _shortfalls(
    options: Scoring, texts: Sequence[Example], examples: Sequence[Example], tasks: Sequence[Task]
) -> list[str]:
    """One sentence per option that asks for more than the suite holds."""
    asked = [("--documents", options.documents, len(texts), "documents")]
    asked += [("--questions", options.questions, len(task_examples(examples, t)), f"of {t.name}") for t in tasks]
    return [
        f"{name} is {count}, but there are only {there} {what}" for name, count, there, what in asked if count > there
    ]


def _load_suite(
    options: Scoring, tokenizer: PreTrainedTokenizerBase
) -> tuple[Sequence[Example], Sequence[Example], tuple[Task, ...]]:
    """The training examples of a suite (none for a file), its test examples, and the tasks that score them."""
    suite = Path(options.suite)
    if suite.suffix in (".yaml", ".yml"):
        config = ATPConfig.load(suite)
        splits = load_recipe(data_settings(config, tokenizer))
        return splits.train, splits.test, splits.tasks
    if options.suite in RECIPES and options.suite != "custom":
        splits = load_recipe(DataSettings(recipe=options.suite, seed=options.seed, general_share=0.0))
        return splits.train, splits.test, splits.tasks
    examples = read_examples(options.suite, options.labels, chat=chat_of(tokenizer))
    return [], examples, tasks_of(examples, options.labels)


def _agreement(ours: dict[str, Any], theirs: dict[str, Any]) -> dict[str, int]:
    """Number of examples on which lm-eval chose our label."""
    if "predictions" not in theirs:
        return {}
    pairs = zip(ours["items"], theirs["predictions"], strict=True)
    return {"agreeing": sum(mine == label for (_, mine), label in pairs)}


def _read_scores(path: Path, tasks: Sequence[Task], majority: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Scores for relative performance, checked by comparing them with themselves."""
    try:
        scores = parse_json(path.read_text(encoding="utf-8"))
        relative_performance(scores, scores, tasks, majority)
    except OSError as error:
        reason = shorten(error.strerror)
        raise InputError(f"cannot read {shorten(path)} ({reason}): pass a file that --output wrote") from error
    except Exception as error:  # a foreign file may lack, or hold, anything
        raise InputError(
            f"{shorten(path)} does not hold the dense model's scores on this suite ({type(error).__name__}: "
            f"{shorten(error)}): pass a file that --output wrote for the dense model"
        ) from error
    return scores
