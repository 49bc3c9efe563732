"""Conversations as prompt and completion."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from transformers import PreTrainedTokenizerBase

from atp.data.encoding import start_ids
from atp.errors import InputError, shorten

Chat = Callable[[Sequence[Mapping[str, str]]], tuple[str, str]]
"""Renders messages of role and content, the last from the assistant, as prompt and completion."""


def plain_chat(messages: Sequence[Mapping[str, str]]) -> tuple[str, str]:
    """One line per message, `Role: content`, for tokenizers without a chat template."""
    lines = [f"{message['role'].capitalize()}: {message['content'].strip()}" for message in messages[:-1]]
    return "\n".join([*lines, "Assistant:"]), f" {messages[-1]['content'].strip()}"


def chat_of(tokenizer: PreTrainedTokenizerBase) -> Chat:
    """The tokenizer's chat template, or `plain_chat` if it has none.

    The completion is the bare answer; the EOS that training appends is the end of turn in chat models. The renderer
    raises `InputError` if the template rejects the messages.
    """
    if tokenizer.chat_template is None:
        return plain_chat
    # A tokenizer that adds BOS does so when the text is encoded.
    bos = tokenizer.bos_token if start_ids(tokenizer) else ""

    def render(messages: Sequence[Mapping[str, str]]) -> tuple[str, str]:
        try:
            asked = [dict(message) for message in messages[:-1]]
            prompt = str(tokenizer.apply_chat_template(asked, tokenize=False, add_generation_prompt=True))
        except Exception as error:  # a template may raise anything
            raise InputError(f"the chat template rejects the messages ({shorten(error)}); correct the roles") from error
        return prompt.removeprefix(bos), messages[-1]["content"].strip()

    return render
