"""`atp eval`: scores of a model folder on a suite."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import ValidationError
from transformers import PreTrainedTokenizerBase

from atp.config import ATPConfig, DataConfig, ModelConfig
from atp.config.overrides import explain
from atp.data import DataSettings, Example, PackedDataset, Pieces, Task, chat_of, load_recipe, read_examples, tasks_of
from atp.data.recipes import RECIPES
from atp.evaluation import (
    evaluate_model,
    model_size,
    packed_windows,
    relative_performance,
    sliding_windows,
    throughput,
)
from atp.evaluation.generation import check_rouge
from atp.evaluation.harness import check_harness, harness_scores
from atp.evaluation.inference import bars
from atp.evaluation.majority import majority_scores
from atp.evaluation.perplexity import ScoredWindows
from atp.evaluation.suite import check_questions, task_examples
from atp.ground import progress
from atp.ground.errors import InputError, is_out_of_memory, reason, shorten
from atp.ground.reading import parse_json
from atp.inputs.loading import (
    check_length,
    check_packages,
    check_vocabulary,
    data_settings,
    held_out,
    load_any_model,
    load_shapes,
    load_tokenizer,
    placed,
    reading,
)
from atp.inputs.precision import Precision, autocast_dtype, precision_at
from atp.report.beside import counted, result_remarks


@dataclass(frozen=True)
class Scoring:
    """Options of `score_folder`.

    suite: a recipe or a run's config.yaml, whose test split is used; or a file of test data (docs/data.md).
    labels: answer set of such a file.
    documents: examples for perplexity, in windows of `length` tokens, `stride` tokens apart; a stride of a whole window
    takes the windows of a run instead. questions: examples per task; 0 for none. seed: of the split and the bootstrap.
    dense: file with the scores of the tuned dense model, for relative performance.
    None: as the run scores, whose config is the suite, so that its figures come back; else `_DEFAULTS`.
    """

    suite: str = "health-mini"
    labels: tuple[str, ...] = ()
    documents: int | None = None
    length: int | None = None
    stride: int | None = None
    questions: int | None = None
    batch_size: int | None = None
    precision: Precision | None = None
    seed: int | None = None
    harness: bool = False
    dense: str | None = None


_DEFAULTS = {"documents": 60, "length": 512, "questions": 100, "batch_size": 8, "precision": "auto", "seed": 0}


@dataclass(frozen=True)
class _Resolved(Scoring):
    """Options with nothing left open. run: the config of the run that is the suite."""

    documents: int = 60
    length: int = 512
    stride: int = 256
    questions: int = 100
    batch_size: int = 8
    precision: Precision = "auto"
    seed: int = 0
    run: ATPConfig | None = field(default=None, repr=False)

    @property
    def packed(self) -> bool:
        """Whether perplexity is over the windows of the run."""
        return self.run is not None and self.stride == self.length


class _Suite(NamedTuple):
    """What a model is scored on: the training examples (none of a file), the test examples, and their tasks.

    packed: the windows for perplexity of the run whose config is the suite.
    """

    train: Sequence[Example]
    test: Sequence[Example]
    tasks: tuple[Task, ...]
    packed: PackedDataset | Pieces | None = None


def _resolved(options: Scoring) -> _Resolved:
    run = ATPConfig.load(options.suite) if options.suite.endswith((".yaml", ".yml")) else None
    values: dict[str, Any] = dict(_DEFAULTS)
    if run is not None:
        scored = run.evaluation
        values |= {"questions": scored.questions, "batch_size": scored.batch_size, "seed": run.seed}
        values["precision"] = run.training.precision
        if options.length is None and options.stride is None:
            values |= {"documents": scored.windows, "length": run.data.length, "stride": run.data.length}
    values |= {name: value for name, value in vars(options).items() if value is not None}
    return _Resolved(**{"stride": values["length"] // 2} | values, run=run)


def score_folder(model: str, options: Scoring, gguf_file: str | None = None) -> dict[str, Any]:
    """Perplexity, answers, size and speed of a model: the result of `evaluate_model`, with its settings.

    Raises `InputError` for a wrong model, suite or option before the model runs, and when memory runs out.
    """
    resolved = _resolved(options)
    try:
        return _score_folder(model, resolved, gguf_file)
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        less = [f"--batch-size {resolved.batch_size // 2}"] if resolved.batch_size > 1 else []
        less += [f"--length {resolved.length // 2}"] if resolved.length > 3 else []
        remedy = f"use {' or '.join(less)}" if less else "use a machine with more memory"
        raise InputError(f"out of memory ({reason(error)}): {remedy}") from error


def _score_folder(model: str, options: _Resolved, gguf_file: str | None) -> dict[str, Any]:
    source = _source(model, gguf_file, options.run)
    check_packages(source, _data_of(options))
    tokenizer = load_tokenizer(source)
    check_vocabulary(source, tokenizer)
    shapes = load_shapes(source)
    check_length(shapes, options.length, "--length")
    progress.begin("reading the data")
    with reading("data set"):
        suite = _load_suite(options, tokenizer)
    examples = suite.test
    windows, there = _windows(options, suite, tokenizer)
    tasks, unscored = _scorable(suite.tasks, options)
    check_questions(tokenizer, shapes, examples, tasks, max_examples=options.questions)
    majority = majority_scores(suite.train, examples, tasks, max_examples=options.questions, seed=options.seed)
    dense = _read_scores(Path(options.dense), tasks, majority) if options.dense else None
    if options.harness:
        check_harness()
    progress.begin("loading")
    precision = precision_at(options.precision, model, options.suite)
    with reading("model"):
        loaded = placed(load_any_model(source))
    autocast = autocast_dtype(precision)
    common: dict[str, Any] = {"batch_size": options.batch_size, "max_examples": options.questions, "autocast": autocast}
    most = options.documents if options.packed else None
    with progress.Bars(transient=True) as display:
        scores: dict[str, Any] = evaluate_model(
            loaded, tokenizer, windows, examples, tasks=tasks, seed=options.seed, max_windows=most,
            progress=bars(display, "scoring"), **common,
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
        "settings": {k: v for k, v in vars(options).items() if k != "run"} | {"precision": precision},
        "remarks": [
            *counted(scores), *unscored, *_shortfalls(options, there, examples, tasks), *result_remarks(scores),
        ],
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


def _source(model: str, gguf_file: str | None, run: ATPConfig | None) -> ModelConfig:
    """Where the model is; the one that a run began with is read as the run reads it."""
    try:
        source = ModelConfig(path=model, gguf_file=gguf_file)
    except ValidationError as error:
        raise InputError(f"the model: {explain(error, ModelConfig)}") from None
    if run is None or (source.path, source.gguf_file) != (run.model.path, run.model.gguf_file):
        return source
    return run.model.model_copy(update={"load_in": None})


def _data_of(options: _Resolved) -> DataConfig:
    """The data settings behind a suite."""
    if options.run is not None:
        return options.run.data
    return DataConfig(recipe=options.suite if options.suite in RECIPES else "custom", general_share=0.0)


def _windows(
    options: _Resolved, suite: _Suite, tokenizer: PreTrainedTokenizerBase
) -> tuple[ScoredWindows, tuple[str, int]]:
    """The windows for perplexity, and what there is of them: in words, and how many."""
    if suite.packed is not None:
        return packed_windows(suite.packed, tokenizer, options.documents), ("windows", len(suite.packed))
    # Plain text if the recipe holds some out for this, else everything that is held out.
    texts = [example for example in suite.test if not example.completion] or suite.test
    windows = sliding_windows(texts[: options.documents], tokenizer, options.length, options.stride)
    return windows, ("documents", len(texts))


def _scorable(tasks: Sequence[Task], options: _Resolved) -> tuple[Sequence[Task], list[str]]:
    """The tasks that can be scored here, and a sentence on those that an optional package is missing for."""
    if not options.questions:
        return (), []
    free = [task.name for task in tasks if not task.labels]
    try:
        if free:
            check_rouge()
    except InputError as error:
        return [task for task in tasks if task.labels], [f"Not scored: {', '.join(free)}, because {error}."]
    return tasks, []


def _shortfalls(
    options: _Resolved, there: tuple[str, int], examples: Sequence[Example], tasks: Sequence[Task]
) -> list[str]:
    """One sentence per option that asks for more than the suite holds."""
    asked = [("--documents", options.documents, there[1], there[0])]
    asked += [("--questions", options.questions, len(task_examples(examples, t)), f"of {t.name}") for t in tasks]
    return [
        f"{name} is {count}, but there are only {there} {what}" for name, count, there, what in asked if count > there
    ]


def _load_suite(options: _Resolved, tokenizer: PreTrainedTokenizerBase) -> _Suite:
    if options.run is not None:
        splits = load_recipe(data_settings(options.run, tokenizer))
        tasks = tuple(task for task in splits.tasks if task.labels or options.run.evaluation.generate)
        packed = held_out(options.run, splits, tokenizer) if options.packed else None
        return _Suite(splits.train, splits.test, tasks, packed)
    if options.suite in RECIPES and options.suite != "custom":
        splits = load_recipe(DataSettings(recipe=options.suite, seed=options.seed, general_share=0.0))
        return _Suite(splits.train, splits.test, splits.tasks)
    examples = read_examples(options.suite, options.labels, chat=chat_of(tokenizer))
    return _Suite([], examples, tasks_of(examples, options.labels))


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
