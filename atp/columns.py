"""What the columns of a file are for, guessed from their names and values: for `atp init`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from atp.errors import InputError, shorten

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


@dataclass
class Columns:
    """shape: what rows are read as. columns, labels, label_names: those keys of `data`, where they are needed.

    remarks: sentences on a column of classes.
    """

    shape: str
    columns: dict[str, str] = field(default_factory=dict)
    labels: Sequence[str] = ()
    label_names: Sequence[str] = ()
    remarks: list[str] = field(default_factory=list)


def guess_columns(rows: Sequence[dict[str, Any]]) -> Columns:
    """Raises `InputError` where no name tells what a column holds.

    A column that says which of a few classes a text is of is what a model learns to answer.
    """
    named = list(dict.fromkeys(name for row in rows for name in row))
    shape, column = _shape(named), _class_column(rows[0], named)
    labels, label_names = _classes([row.get(column) for row in rows]) if column else ((), ())
    classed = bool(labels or label_names)
    if shape and classed and (shape, column) in _ANSWERED:
        return Columns(shape, {}, labels, label_names)
    columns = {} if shape else _guessed(rows[0], [name for name in named if not (classed and name == column)])
    shape = shape or ("text" if "text" in columns else "prompt and completion")
    if shape == "text":
        text = columns.get("text", "text")
    elif shape == "prompt and completion" and "prompt" in named and "completion" not in named:
        text = "prompt"
    else:
        return Columns(shape, columns)
    if column is None or column == text:
        return Columns(shape, columns)
    answered = {"prompt": text, "completion": column}
    if classed:
        said = "the model learns to give a text's class; without that column it learns the texts alone"
        return Columns("prompt and completion", answered, labels, label_names, [said])
    said = (
        f"column {column} is not read, as it does not hold a few classes in these rows; for a model that learns to "
        f"give them set data.columns to {{prompt: {text}, completion: {column}}}"
    )
    return Columns(shape, columns, remarks=[said])


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


def _guessed(row: dict[str, Any], named: Sequence[str]) -> dict[str, str]:
    """`data.columns` for columns of other names. Raises `InputError` where no name tells what it holds."""
    texts = [name for name in named if isinstance(row.get(name), str)]
    by_name = {name.lower(): name for name in reversed(texts)}
    prompt, completion, text = (
        next((by_name[name] for name in names if name in by_name), None) for names in (_PROMPT, _COMPLETION, _TEXT)
    )
    if prompt is None and "question" in by_name:
        prompt = by_name["question"]
    if prompt and completion and prompt != completion:
        return {"prompt": prompt, "completion": completion}
    if text or len(texts) == 1:
        return {"text": text or texts[0]}
    raise InputError(
        f"none of the columns {shorten(', '.join(named))} is known: say what they hold in a config with data.columns, "
        "as {prompt: COLUMN, completion: COLUMN} or {text: COLUMN}"
    )


def _classes(values: Sequence[Any]) -> tuple[Sequence[str], Sequence[str]]:
    """The labels in a column, or names for its numbers; neither where it is not of a few classes."""
    plain = all(type(value) is int or isinstance(value, str) for value in values)
    labels = labels_of([str(value).strip() for value in values]) if plain else []
    numbers = [int(label) for label in labels if label.isdecimal()]
    if 0 < len(numbers) < len(labels) or max(numbers, default=0) >= _MOST_LABELS:
        return (), ()
    return (() if numbers else labels), [f"class {number}" for number in range(max(numbers, default=-1) + 1)]
