"""The user's own data: which columns mean what."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

from atp.data import conversations
from atp.data.chat import Chat, plain_chat
from atp.data.examples import Example, values
from atp.data.files import open_source
from atp.data.prompts import entailment
from atp.data.rows import Bad, Row, names, stop
from atp.data.splits import document_id
from atp.data.tasks import MEDNLI, ROUGE, Task
from atp.ground.errors import InputError, quote, shorten


@dataclass(frozen=True)
class Meaning:
    """How columns are read.

    labels: the answer set, empty for unlabelled data. label_names: the names of the labels 0, 1, ... where rows hold
    numbers. columns: our name of a column -> its name in the files. chat: renders conversations.
    """

    labels: tuple[str, ...] = ()
    label_names: tuple[str, ...] = ()
    columns: Mapping[str, str] = field(default_factory=dict)
    chat: Chat = plain_chat

    def __post_init__(self) -> None:
        """Raises `InputError` for a name in `columns` that no shape of row has."""
        known = sorted({name for shape in _SHAPES for name in shape.names} | set(_ANYWHERE))
        for name in self.columns:
            if name not in known:
                raise InputError(f"data.columns.{shorten(name)} is unknown: use {', '.join(known)}")

    @property
    def answers(self) -> tuple[str, ...]:
        """The answer set: the labels, by default all that have a name."""
        return self.labels or self.label_names


def read_examples(
    source: str, labels: tuple[str, ...] = (), *, limit: int | None = None, chat: Chat = plain_chat,
    meaning: Meaning | None = None, bad: Bad = stop,
) -> list[Example]:  # fmt: skip
    """Examples of one source (`open_source`: a file, a folder or a Hub name), read by its columns (docs/data.md).

    With labels, each row's `label` column (or its completion) must be one of them. An optional column `document` says
    which rows belong together. limit: rows to read. meaning: replaces labels and chat where columns have other names.
    bad: takes the `InputError` of a row that cannot be used, which names source, row, column and remedy, and raises it
    or leaves the row out.
    """
    return list(examples_of(open_source(source, limit, bad).rows, meaning or Meaning(labels, chat=chat), bad))


def examples_of(rows: Iterable[Row], meaning: Meaning, bad: Bad = stop) -> Iterator[Example]:
    """The examples in rows; bad as for `read_examples`."""
    for row in rows:
        try:
            found = _example(replace(row, columns=meaning.columns), meaning)
        except InputError as error:
            bad(error)
        else:
            yield found


def tasks_of(examples: Sequence[Example], labels: tuple[str, ...] = ()) -> tuple[Task, ...]:
    """The tasks that score a user's own examples: `qa`, `nli`, and `answers` for free text."""
    named = set(values(examples, "task"))
    known = (
        Task("qa", labels), Task("nli", labels or MEDNLI.labels, ("accuracy",)), Task("answers", metrics=ROUGE)
    )  # fmt: skip
    return tuple(task for task in known if task.name in named)


def check_label(row: Row, label: str, labels: Sequence[str]) -> str:
    """Returns the label. Raises `InputError` if it is not one of `labels`."""
    if not label:
        raise InputError(f"{row.where}: no label; write one of {shorten(', '.join(labels))}, or remove the row")
    if label not in labels:
        raise InputError(
            f"{row.where}: label '{shorten(label)}' is not one of {shorten(', '.join(labels))}; correct the row"
        )
    return label


def _example(row: Row, meaning: Meaning) -> Example:
    # A mapped column decides which shape is meant, since a file may have columns of several.
    mapped = [shape for shape in _SHAPES if any(name in meaning.columns for name in shape.names)]
    for shape in mapped or _SHAPES:
        if mapped or row.has(shape.names[0]):
            return shape.read(row, meaning)
    raise InputError(
        f"{row.where}: neither column 'text' nor columns 'prompt' and 'completion', 'messages', or 'premise', "
        f"'hypothesis' and 'label' (found: {names(row.values)}); rename the columns, or set data.columns"
    )


def _plain(row: Row, meaning: Meaning) -> Example:
    text = row.text("text")
    if meaning.answers:
        answer = "label" if row.has("label") else "COLUMN"
        raise InputError(
            f"{row.where}: a text teaches no label, and data.labels or data.label_names is set; leave that out, or set "
            f"data.columns={{prompt: {meaning.columns.get('text', 'text')}, completion: {answer}}}"
        )
    return _answered(row, text, "", meaning)


def _messages(row: Row, meaning: Meaning) -> Example:
    return _talk(row, conversations.messages_of(row, "messages"), meaning)


def _conversations(row: Row, meaning: Meaning) -> Example:
    messages = conversations.messages_of(row, "conversations")
    return _talk(row, conversations.with_system(row, messages), meaning)


def _entailment(row: Row, meaning: Meaning) -> Example:
    premise, known = row.text("premise"), meaning.answers or MEDNLI.labels
    label = _named(row, "label", meaning)
    if label is None and type(number := row.get("label")) is int:
        raise InputError(
            f"{row.at('label')} holds the number {quote(number)}, and numbers differ between "
            f"data sets; set data.label_names, or write the label's name: {shorten(', '.join(known))}"
        )
    label = check_label(row, (label or row.text("label")).strip(), known)
    prompt = entailment(premise, row.text("hypothesis"))
    return Example(_document(row, premise), prompt, f" {label}", label, "nli", premise)


def _prompted(row: Row, meaning: Meaning) -> Example:
    prompt = row.get("prompt")
    if isinstance(prompt, list):
        asked, answer = conversations.prompt_and_completion(row)
        return _talk(row, [*asked, *answer], meaning, first=len(asked))
    prompt, completion = row.text("prompt"), _named(row, "completion", meaning) or row.text("completion")
    mapped = "prompt" in meaning.columns or "completion" in meaning.columns or bool(meaning.label_names)
    if mapped and completion and not completion[0].isspace() and not prompt[-1:].isspace():
        completion = f" {completion}"  # columns that were not made to be joined
    return _answered(row, prompt, completion, meaning)


def _instruction(row: Row, meaning: Meaning) -> Example:
    return _talk(row, conversations.instruction(row), meaning)


def _question(row: Row, meaning: Meaning) -> Example:
    return _talk(row, conversations.question(row), meaning)


class _Shape(NamedTuple):
    """One way to write a row: its columns, the first of which shows that it is meant."""

    read: Callable[[Row, Meaning], Example]
    names: tuple[str, ...]


_SHAPES = (
    _Shape(_plain, ("text",)),
    _Shape(_messages, ("messages",)),
    _Shape(_conversations, ("conversations",)),
    _Shape(_entailment, ("premise", "hypothesis")),
    _Shape(_prompted, ("prompt", "completion")),
    _Shape(_instruction, ("instruction", "input", "output", "history")),
    _Shape(_question, ("question", "answer", "context")),
)
_ANYWHERE = ("document", "label", "system", "tools")


def _talk(row: Row, messages: Sequence[dict[str, Any]], meaning: Meaning, *, first: int = 0) -> Example:
    """first: index of the first message that may be learned."""
    if messages[-1]["role"] != "assistant" or len(messages) < 2:
        raise InputError(f"{row.where}: the messages do not end with the assistant's answer; correct the row")
    tools = conversations.tools_of(row)
    try:
        talk = meaning.chat(messages, tools, first=first)
    except InputError as error:
        raise InputError(f"{row.where}: {error}") from error
    if not talk.completion.strip():
        raise InputError(f"{row.where}: the assistant's last answer is empty; remove the row")
    return replace(_answered(row, talk.prompt, talk.completion, meaning), turns=talk.turns)


def _answered(row: Row, prompt: str, completion: str, meaning: Meaning) -> Example:
    if not (prompt + completion).strip():
        raise InputError(f"{row.where}: no text; remove the row")
    label, labels = None, meaning.answers
    if labels:
        given = (_named(row, "label", meaning) or row.text("label")) if row.has("label") else completion
        label = check_label(row, given.strip(), labels)
    task = "qa" if labels else "answers" if completion else ""
    return Example(_document(row, prompt), prompt, completion, label, task)


def _named(row: Row, column: str, meaning: Meaning) -> str | None:
    """The name of the number in a column, None if it holds something else or no names are given."""
    value, known = row.get(column), meaning.label_names
    text = value.strip() if isinstance(value, str) else ""  # a CSV file holds numbers as text
    number = value if type(value) is int else int(text) if text.isdecimal() and len(text) < 10 else None
    if number is None or not known or text in known:
        return None
    if not 0 <= number < len(known):
        raise InputError(
            f"{row.at(column)} holds {quote(number)}, but data.label_names has names for 0 to "
            f"{len(known) - 1}; correct the row or add names"
        )
    return known[number]


def _document(row: Row, text: str) -> str:
    return document_id(row.text("document") if row.has("document") else text)
