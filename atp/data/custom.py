"""The user's own data: which columns mean what."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from atp.data.chat import Chat, plain_chat
from atp.data.files import Row, names, read_rows
from atp.data.prompts import entailment
from atp.data.splits import Example, document_id
from atp.data.tasks import MEDNLI, ROUGE, Task
from atp.errors import InputError, quote, shorten

ROLES = ("system", "user", "assistant")


def read_examples(
    source: str, labels: tuple[str, ...] = (), *, limit: int | None = None, chat: Chat = plain_chat
) -> list[Example]:
    """Examples of one source (a .jsonl, .csv or .parquet file, or a Hub name), read by its columns.

    `text`: plain text. `prompt`, `completion`: a question and its answer. `messages`: a list of role and content that
    ends with the assistant's answer, rendered by `chat`. `premise`, `hypothesis`, `label`: entailment.
    With labels, each row's `label` column (or its completion) must be one of them. An optional column `document` says
    which rows belong together. limit: rows to read. Raises `InputError` naming source, row, column and remedy.
    """
    return [_example(row, labels, chat) for row in read_rows(source, limit)]


def tasks_of(examples: Iterable[Example], labels: tuple[str, ...] = ()) -> tuple[Task, ...]:
    """The tasks that score a user's own examples: `qa`, `nli`, and `answers` for free text."""
    named = {example.task for example in examples}
    known = (
        Task("qa", labels), Task("nli", labels or MEDNLI.labels, ("accuracy",)), Task("answers", metrics=ROUGE)
    )  # fmt: skip
    return tuple(task for task in known if task.name in named)


def check_label(row: Row, label: str, labels: Sequence[str]) -> str:
    """Returns the label. Raises `InputError` if it is not one of `labels`."""
    if label not in labels:
        raise InputError(
            f"{row.where}: label '{shorten(label)}' is not one of {shorten(', '.join(labels))}; correct the row"
        )
    return label


def _example(row: Row, labels: tuple[str, ...], chat: Chat) -> Example:
    for column, read in _READERS.items():
        if column in row.values:
            return read(row, labels, chat)
    raise InputError(
        f"{row.where}: neither column 'text' nor columns 'prompt' and 'completion', 'messages', or 'premise', "
        f"'hypothesis' and 'label' (found: {names(row.values)}); rename the columns"
    )


def _entailment(row: Row, labels: tuple[str, ...], chat: Chat) -> Example:
    premise, known = row.text("premise"), labels or MEDNLI.labels
    if type(number := row.get("label")) is int:
        raise InputError(
            f"{row.where}: column 'label' holds the number {quote(number)}, and numbers differ between data "
            f"sets; write the label's name: {shorten(', '.join(known))}"
        )
    label = check_label(row, row.text("label").strip(), known)
    prompt = entailment(premise, row.text("hypothesis"))
    return Example(_document(row, premise), prompt, f" {label}", label, "nli", premise)


def _messages(row: Row, labels: tuple[str, ...], chat: Chat) -> Example:
    messages = row.get("messages")
    if not isinstance(messages, list) or not messages or not all(_is_message(message) for message in messages):
        raise InputError(
            f"{row.where}: column 'messages' is not a list of records with 'role' ({', '.join(ROLES)}) and 'content'; "
            "correct the row"
        )
    if messages[-1]["role"] != "assistant" or len(messages) < 2:
        raise InputError(f"{row.where}: the messages do not end with the assistant's answer; correct the row")
    try:
        prompt, completion = chat(messages)
    except InputError as error:
        raise InputError(f"{row.where}: {error}") from error
    return _answered(row, prompt, completion, labels)


def _plain(row: Row, labels: tuple[str, ...], chat: Chat) -> Example:
    return _answered(row, row.text("text"), "", labels)


def _prompted(row: Row, labels: tuple[str, ...], chat: Chat) -> Example:
    if isinstance(row.get("prompt"), list):
        raise InputError(
            f"{row.where}: column 'prompt' holds a conversation; put its messages and the answer, in order, into a "
            "column 'messages'"
        )
    return _answered(row, row.text("prompt"), row.text("completion"), labels)


_READERS: dict[str, Callable[[Row, tuple[str, ...], Chat], Example]] = {
    "text": _plain, "messages": _messages, "premise": _entailment, "prompt": _prompted
}  # fmt: skip


def _answered(row: Row, prompt: str, completion: str, labels: tuple[str, ...]) -> Example:
    if not (prompt + completion).strip():
        raise InputError(f"{row.where}: no text; remove the row")
    label = None
    if labels:
        label = check_label(row, (row.text("label") if "label" in row.values else completion).strip(), labels)
    task = "qa" if labels else "answers" if completion else ""
    return Example(_document(row, prompt), prompt, completion, label, task)


def _document(row: Row, text: str) -> str:
    return document_id(row.text("document") if "document" in row.values else text)


def _is_message(message: object) -> bool:
    return isinstance(message, dict) and message.get("role") in ROLES and isinstance(message.get("content"), str)
