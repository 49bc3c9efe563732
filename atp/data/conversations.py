"""Conversations in the shapes that other programs write, as messages of role and content."""

from __future__ import annotations

from typing import Any

from atp.data.chat import ROLES
from atp.data.rows import Row
from atp.ground.errors import InputError, quote
from atp.ground.reading import parse_json

# The speakers of a conversation with `from` and `value` (ShareGPT) -> role.
_SPEAKERS = {
    "human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "model": "assistant",
    "bot": "assistant", "chatbot": "assistant", "system": "system", "tool": "tool", "observation": "tool",
    "function_call": "assistant",
}  # fmt: skip


def messages_of(row: Row, column: str) -> list[dict[str, Any]]:
    """The messages in a column: records of `role` and `content`, or of `from` and `value`. Raises `InputError`."""
    value = row.get(column)
    messages = [_message(row, item) for item in value] if isinstance(value, list) else []
    if not messages or None in messages:
        raise InputError(
            f"{row.at(column)} is not a list of records with 'role' ({', '.join(ROLES)}) and "
            "'content', or with 'from' and 'value'; correct the row"
        )
    return [message for message in messages if message is not None]


def with_system(row: Row, messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The messages after the text of column `system`, if there is any and they do not begin with one."""
    text = row.optional("system")
    begun = not text or (messages and messages[0]["role"] == "system")
    return messages if begun else [{"role": "system", "content": text}, *messages]


def instruction(row: Row) -> list[dict[str, Any]]:
    """The messages of an Alpaca row: earlier pairs in `history`, then `instruction` with `input`, then `output`."""
    history = row.get("history") or [] if row.has("history") else []
    if not isinstance(history, list) or not all(_is_pair(pair) for pair in history):
        raise InputError(f"{row.at('history')} is not a list of pairs of texts; correct the row")
    asked = "\n\n".join(part for part in (row.text("instruction"), row.optional("input")) if part.strip())
    pairs = [*history, (asked, row.text("output"))]
    return with_system(row, [message for question, answer in pairs for message in _pair(question, answer)])


def question(row: Row) -> list[dict[str, Any]]:
    """The messages of a row with columns `question`, `answer` and perhaps `context`, which comes first."""
    asked = "\n\n".join(part for part in (row.optional("context"), row.text("question")) if part.strip())
    return _pair(asked, row.text("answer"))


def prompt_and_completion(row: Row) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The messages of columns `prompt` and `completion`, as TRL has them; a completion may be a plain text."""
    completion = row.get("completion")
    answer = [{"role": "assistant", "content": completion}] if isinstance(completion, str) else None
    return messages_of(row, "prompt"), answer or messages_of(row, "completion")


def tools_of(row: Row) -> list[Any] | None:
    """The JSON schemas in column `tools`: a list, or its JSON text. None if there are none. Raises `InputError`."""
    value = row.get("tools") if row.has("tools") else None
    if isinstance(value, str) and value.strip():
        try:
            value = parse_json(value)
        except ValueError as error:
            raise InputError(f"{row.at('tools')} is not valid JSON ({error})") from error
    if value and not (isinstance(value, list) and all(isinstance(tool, dict) for tool in value)):
        raise InputError(f"{row.at('tools')} holds {quote(value, 60)}, not a list of schemas")
    return value or None


def _pair(question: str, answer: str) -> list[dict[str, Any]]:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def _is_pair(value: object) -> bool:
    return isinstance(value, list) and len(value) == 2 and all(isinstance(part, str) for part in value)


def _message(row: Row, item: Any) -> dict[str, Any] | None:
    """One message with a role that we know and a text or calls of tools; None for anything else."""
    if not isinstance(item, dict):
        return None
    if item.get("role") is None and item.get("from") is not None:
        return _spoken(row, item["from"], item.get("value"))
    content, calls = item.get("content"), item.get("tool_calls")
    if isinstance(content, list) and all(_is_text_part(part) for part in content):
        content = "".join(part["text"] for part in content)
    called = item.get("role") == "assistant" and isinstance(calls, list) and bool(calls)
    if item.get("role") not in ROLES or not (isinstance(content, str) or (content is None and called)):
        return None
    return item | {"content": content}


def _spoken(row: Row, speaker: object, value: object) -> dict[str, Any] | None:
    role = _SPEAKERS.get(speaker) if isinstance(speaker, str) else None
    if role is None or not isinstance(value, str):
        return None
    if speaker != "function_call":
        return {"role": role, "content": value}
    try:
        call = parse_json(value)
    except ValueError as error:
        raise InputError(f"{row.where}: a message from function_call is not valid JSON ({error})") from error
    calls = call if isinstance(call, list) else [call]
    return {"role": role, "content": None, "tool_calls": [{"type": "function", "function": call} for call in calls]}


def _is_text_part(part: object) -> bool:
    return isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str)
