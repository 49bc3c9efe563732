"""Conversations as prompt and completion."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from transformers import PreTrainedTokenizerBase

from atp.data.encoding import start_ids
from atp.errors import InputError, shorten

Chat = Callable[[Sequence[Mapping[str, str]]], tuple[str, str]]
"""Renders messages of role and content, the last of them the assistant's, as prompt and completion."""


def plain_chat(messages: Sequence[Mapping[str, str]]) -> tuple[str, str]:
    """One line a message, `Role: content`: for tokenizers without a chat template."""
    lines = [f"{message['role'].capitalize()}: {message['content'].strip()}" for message in messages[:-1]]
    return "\n".join([*lines, "Assistant:"]), f" {messages[-1]['content'].strip()}"


def chat_of(tokenizer: PreTrainedTokenizerBase) -> Chat:
    """The tokenizer's own chat template, or `plain_chat` where it has none.

    The completion is the bare answer: EOS, which ends it in training, is the template's end of turn in chat models.
    The renderer raises `InputError` when the template refuses the messages.
    """
    if tokenizer.chat_template is None:
        return plain_chat
    # Encodings begin with BOS already where the tokenizer puts it.
    bos = tokenizer.bos_token if start_ids(tokenizer) else ""

    def render(messages: Sequence[Mapping[str, str]]) -> tuple[str, str]:
        try:
            prompt = tokenizer.apply_chat_template(list(messages[:-1]), tokenize=False, add_generation_prompt=True)
        except Exception as error:  # a template is code of the model's, and raises what it likes
            raise InputError(f"the chat template refuses the messages ({shorten(error)}); correct the roles") from error
        return prompt.removeprefix(bos), messages[-1]["content"].strip()

    return render
