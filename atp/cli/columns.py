"""What the columns of a file are for, guessed from their names and values: for `atp init`."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from atp.ground.errors import InputError, shorten

# What other data sets call our columns, likeliest first.
_TEXT = "content body article document passage sentence review abstract description code story".split()
_PROMPT = "query input source context article document problem text_input user src".split()
_COMPLETION = "response answer output target summary highlights solution reply assistant tgt".split()
_CLASS = "label labels class category sentiment topic intent emotion rating stars".split()
_ANSWERED = (
    ("premise and hypothesis", "label"),
    ("prompt and completion", "completion"),
)  # shapes with a column for it
_MOST_LABELS = 20
_NUMBER = re.compile(r"[-+]?[0-9.,]+")
_FEW = 0.1  # of the rows: as many may lack what the others have


@dataclass
class Columns:
    """shape: what rows are read as. columns, labels, label_names: those keys of `data`, where they are needed.

    remarks: sentences on a column of classes. sure: whether names say it; else it was guessed by what columns hold.
    """

    shape: str
    columns: dict[str, str] = field(default_factory=dict)
    labels: Sequence[str] = ()
    label_names: Sequence[str] = ()
    remarks: list[str] = field(default_factory=list)
    sure: bool = True


def given_columns(rows: Sequence[dict[str, Any]], columns: dict[str, str]) -> Columns:
    """What columns that the user has named hold: the shape, and a few classes among the answers."""
    return _answered(rows, _shape(list(columns)) or "prompt and completion", columns)


def guess_columns(rows: Sequence[dict[str, Any]]) -> Columns:
    """Raises `InputError` where no column holds text.

    A column that says which of a few classes a text is of is what a model learns to answer.
    """
    named, typical = _usual(rows)
    shape, column = _shape(named), _class_column(typical, named)
    labels, label_names = _classes([row.get(column) for row in rows]) if column else ((), ())
    classed = bool(labels or label_names)
    if shape and classed and (shape, column) in _ANSWERED:
        return Columns(shape, {}, labels, label_names)
    rest = [name for name in named if not (classed and name == column)]
    columns, sure = ({}, True) if shape else _guessed(rows, typical, rest)
    shape = shape or ("text" if "text" in columns else "prompt and completion")
    if shape == "text":
        text = columns.get("text", "text")
    elif shape == "prompt and completion" and "prompt" in named and "completion" not in named:
        text = "prompt"
    else:
        return _answered(rows, shape, columns, sure)
    if column is None or column == text:
        return _answered(rows, shape, columns, sure)
    answered = {"prompt": text, "completion": column}
    if classed:
        said = "the model learns to give a text's class; without that column it learns the texts alone"
        return Columns("prompt and completion", answered, labels, label_names, [said], sure)
    said = (
        f"column {column} is not read, as it does not hold a few classes in these rows; for a model that learns to "
        f"give them set data.columns to {{prompt: {text}, completion: {column}}}"
    )
    return Columns(shape, columns, remarks=[said], sure=sure)


def _answered(rows: Sequence[dict[str, Any]], shape: str, columns: dict[str, str], sure: bool = True) -> Columns:
    """The columns, with the few classes that the answers of this shape are of, if they are."""
    answers = next((columns.get(name, name) for of, name in _ANSWERED if of == shape), None)
    labels, label_names = ((), ()) if answers is None else _classes([_value(row, answers) for row in rows])
    return Columns(shape, columns, labels, label_names, sure=sure)


def labels_of(answers: Sequence[str]) -> list[str]:
    """The answer set, if short answers repeat so often that they are one."""
    counts = Counter(answers)
    few = 2 <= len(counts) <= _MOST_LABELS and len(answers) >= 10 * len(counts)
    return sorted(counts) if few and all(0 < len(answer) <= 40 for answer in counts) else []


def _shape(named: Sequence[str]) -> str | None:
    """What rows with these columns are read as; None if the columns need other names."""
    for first, shape in (
        ("text", "text"), ("messages", "messages"), ("conversations", "conversations"),
        ("premise", "premise and hypothesis"), ("prompt", "prompt and completion"),
        ("instruction", "instruction and output"), ("question", "question and answer"),
    ):  # fmt: skip
        if first in named and (first != "question" or "answer" in named):
            return shape
    return None


def _class_column(row: dict[str, Any], named: Sequence[str]) -> str | None:
    """The column that may hold classes, by its name; one that is meant for answers if it holds a number."""
    by_name = {name.lower(): name for name in reversed(named)}
    numbers = (name for name in ("completion", *_COMPLETION) if type(row.get(by_name.get(name, ""))) is int)
    found = next((name for name in _CLASS if name in by_name), None) or next(numbers, None)
    return by_name[found] if found else None


def _usual(rows: Sequence[dict[str, Any]]) -> tuple[list[str], dict[str, Any]]:
    """The names that most rows have, and for each its first value that is none of nothing."""
    counts = Counter(name for row in rows for name in row)
    named = [name for name in counts if 2 * counts[name] > len(rows)] or list(counts)
    typical = {name: next((row[name] for row in rows if row.get(name) not in (None, "")), None) for name in named}
    return named, typical


def _value(row: dict[str, Any], column: str) -> Any:
    """The value of a column, in which a dot leads into a record; None if there is none."""
    value: Any = row
    for name in column.split("."):
        value = value.get(name) if isinstance(value, dict) else None
    return value


def _guessed(
    rows: Sequence[dict[str, Any]], typical: dict[str, Any], named: Sequence[str]
) -> tuple[dict[str, str], bool]:
    """`data.columns` for columns of other names, and whether these say what they hold.

    Raises `InputError` where no column holds text.
    """
    # A CSV file holds numbers as text.
    texts = [name for name in named if isinstance(typical[name], str) and not _NUMBER.fullmatch(typical[name].strip())]
    by_name = {name.lower(): name for name in reversed(texts)}
    prompt, completion, text = (
        next((by_name[name] for name in names if name in by_name), None) for names in (_PROMPT, _COMPLETION, _TEXT)
    )
    if prompt is None and "question" in by_name:
        prompt = by_name["question"]
    if prompt and completion and prompt != completion:
        return {"prompt": prompt, "completion": completion}, True
    if text or len(texts) == 1:
        return {"text": text or texts[0]}, True
    if not texts:
        raise InputError(
            f"none of the columns {shorten(', '.join(named))} is known, and none holds text: say what they hold with "
            "--columns prompt=COLUMN,completion=COLUMN or --columns text=COLUMN"
        )
    if len(texts) == 2:
        return dict(zip(("prompt", "completion"), texts, strict=True)), False
    lengths = {name: sum(len(row[name]) for row in rows if isinstance(row.get(name), str)) for name in texts}
    return {"text": max(texts, key=lengths.__getitem__)}, False


def _classes(values: Sequence[Any]) -> tuple[Sequence[str], Sequence[str]]:
    """The labels in a column, or names for its numbers; neither where it is not of a few classes.

    A few rows may lack one.
    """
    every = len(values)
    values = [value for value in values if value is not None and str(value).strip()]
    if every - len(values) > _FEW * every:
        return (), ()
    plain = all(type(value) is int or isinstance(value, str) for value in values)
    labels = labels_of([str(value).strip() for value in values]) if plain else []
    numbers = [int(label) for label in labels if label.isdecimal()]
    if 0 < len(numbers) < len(labels) or max(numbers, default=0) >= _MOST_LABELS:
        return (), ()
    return (() if numbers else labels), [f"class {number}" for number in range(max(numbers, default=-1) + 1)]
