"""Conversations as prompt and completion, and where in the prompt the assistant's earlier turns stand."""

from __future__ import annotations

import json
import re
import signal
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from os.path import commonprefix
from types import FrameType
from typing import Any, NamedTuple, Protocol, cast

import transformers
from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import render_jinja_template

from atp.data.encoding import start_ids
from atp.ground.errors import InputError, shorten

ROLES = ("system", "developer", "user", "assistant", "tool", "function")
_MOST_SECONDS = 10.0  # for what takes a millisecond
_MARKED = re.compile(r"\{%-?\s*generation\s*-?%\}")  # a template that says itself what the assistant writes

_jinja: Callable[..., Any] = render_jinja_template  # its own annotation leaves out the spans

Message = Mapping[str, Any]
"""`role`, one of ROLES, and `content`; an assistant's message may have `tool_calls` instead."""
Span = tuple[int, int]


class Talk(NamedTuple):
    """A conversation as text. The EOS that training appends to the completion ends the turn in chat models.

    turns: start and end, in characters of the prompt, of the assistant's turns before the last, each with its
    end-of-turn token; empty if they were not asked for.
    """

    prompt: str
    completion: str
    turns: tuple[Span, ...] = ()


class Chat(Protocol):
    """Renders messages, the last from the assistant.

    tools: JSON schemas of functions that the template describes to the model. first: index of the first message that
    may be learned; those before are context.
    """

    def __call__(self, messages: Sequence[Message], tools: Sequence[Any] | None = None, *, first: int = 0) -> Talk: ...


def plain_chat(messages: Sequence[Message], tools: Sequence[Any] | None = None, *, first: int = 0) -> Talk:
    """One line per message, `Role: content`, for tokenizers without a chat template. Tools are left out."""
    prompt, turns = "", []
    for index, message in enumerate(messages[:-1]):
        prompt += f"{message['role'].capitalize()}:"
        start = len(prompt)
        prompt += f" {_said(message)}\n"
        if message["role"] == "assistant" and index >= first:
            turns.append((start, len(prompt)))
    return Talk(f"{prompt}Assistant:", f" {_said(messages[-1])}", tuple(turns))


def _said(message: Message) -> str:
    """The content of a message, or the calls in its place."""
    return (message.get("content") or "").strip() or (json.dumps(calls) if (calls := message.get("tool_calls")) else "")


def chat_of(tokenizer: PreTrainedTokenizerBase, *, every_turn: bool = False) -> Chat:
    """The tokenizer's chat template, or `plain_chat` if it has none.

    every_turn: also find the assistant's turns before the last. The renderer raises `InputError` if the template
    rejects the messages or renders them so that a turn cannot be found.
    """
    return plain_chat if tokenizer.chat_template is None else _Template(tokenizer, every_turn)


def key_of(chat: Chat) -> str | None:
    """Text that is the same only for renderers that render alike; None for one that is not ours."""
    if chat is plain_chat:
        return "plain"
    return chat.key if isinstance(chat, _Template) else None


@contextmanager
def _bounded() -> Iterator[None]:
    """Ends a template that loops without end by `TimeoutError`, in the main thread of systems that count CPU time.

    Seconds of this process alone, so that no load on the machine decides whether a template is refused.
    """
    if threading.current_thread() is not threading.main_thread() or not hasattr(signal, "setitimer"):
        yield
        return
    before = signal.signal(signal.SIGVTALRM, _end)
    signal.setitimer(signal.ITIMER_VIRTUAL, _MOST_SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)


def _end(signum: int, frame: FrameType | None) -> None:
    raise TimeoutError(f"takes more than {_MOST_SECONDS} s of CPU time for one conversation")


class _Template:
    def __init__(self, tokenizer: PreTrainedTokenizerBase, every_turn: bool) -> None:
        self.tokenizer, self.every_turn = tokenizer, every_turn
        self.eos = str(tokenizer.eos_token or "")
        # A tokenizer that adds BOS does so when the text is encoded.
        self.bos = str(tokenizer.bos_token) if start_ids(tokenizer) else ""

    @property
    def key(self) -> str:
        """All that a rendering depends on."""
        tokens = self.tokenizer.special_tokens_map
        facts = [self.tokenizer.chat_template, tokens, self.bos, self.every_turn, transformers.__version__]
        return json.dumps(facts, sort_keys=True, default=str)

    def __call__(self, messages: Sequence[Message], tools: Sequence[Any] | None = None, *, first: int = 0) -> Talk:
        # Files with typed columns hold an empty `tool_calls` in every message, and templates ask whether there is one.
        *asked, answer = ({k: v for k, v in message.items() if v is not None} for message in messages)
        prompt = self._render(asked, tools, ask=True)
        if answer.get("tool_calls"):
            whole = self._render([*asked, answer], tools)
            if not whole.startswith(prompt):
                raise InputError("the chat template renders a final call of tools apart from its prompt; remove it")
            completion = whole[len(prompt) :].strip().removesuffix(self.eos).rstrip()
        else:
            completion = answer["content"].strip()
        turns = self._turns(prompt, asked, tools, first) if self.every_turn else ()
        cut = len(prompt) - len(prompt.removeprefix(self.bos))
        return Talk(prompt[cut:], completion, tuple((start - cut, end - cut) for start, end in turns))

    def _render(self, messages: Sequence[Message], tools: Sequence[Any] | None, *, ask: bool = False) -> str:
        """The messages as text; ask: with the beginning of the assistant's next turn."""
        return self._rendered(messages, tools, ask=ask, spans=False)[0]

    def _rendered(
        self, messages: Sequence[Message], tools: Sequence[Any] | None, *, ask: bool, spans: bool
    ) -> tuple[str, list[Span]]:
        """The text, and if asked for the spans that the template itself marks as the assistant's."""
        described = list(tools) if tools else None
        options: dict[str, Any] = {"add_generation_prompt": ask, "return_assistant_tokens_mask": spans}
        try:
            with _bounded():
                texts, marked = _jinja(
                    [list(messages)], described, chat_template=self.tokenizer.get_chat_template(tools=described),
                    **options | self.tokenizer.special_tokens_map,
                )  # fmt: skip
        except TimeoutError as error:
            raise InputError(f"the chat template {error}; use the model's own template") from error
        except Exception as error:  # a template may raise anything
            remedy = "correct the roles"
            if any(message.get("tool_calls") and "content" not in message for message in messages):
                remedy = "it may know no calls of tools: take a model whose template does, or leave such rows out"
            why = shorten(error) or type(error).__name__
            raise InputError(f"the chat template rejects the messages ({why}); {remedy}") from error
        return str(texts[0]), cast(list[Span], marked[0]) if spans else []

    def _turns(self, prompt: str, asked: Sequence[Message], tools: Sequence[Any] | None, first: int) -> Iterator[Span]:
        indices = [i for i, message in enumerate(asked) if message["role"] == "assistant" and i >= first]
        if not indices:
            return
        if _MARKED.search(self.tokenizer.get_chat_template(tools=list(tools) if tools else None)):
            begin = len(self._render(asked[:first], tools)) if first else 0
            _, marked = self._rendered(asked, tools, ask=True, spans=True)
            yield from (span for span in marked if span[0] >= begin)
            return
        for index in indices:
            start, end = self._by_prefixes(prompt, asked, index, tools) or self._by_change(prompt, asked, index, tools)
            yield start, start + len(prompt[start:end].rstrip())  # a line break after the turn's end is nobody's

    def _by_prefixes(
        self, prompt: str, asked: Sequence[Message], index: int, tools: Sequence[Any] | None
    ) -> Span | None:
        """A turn as what its rendering adds to that of the messages before; None if either is no part of the prompt."""
        if index == 0:  # there is nothing before it that a template renders
            return None
        before = self._render(asked[:index], tools, ask=True)
        after = self._render(asked[: index + 1], tools)
        found = prompt.startswith(before) and prompt.startswith(after) and len(before) < len(after)
        return (len(before), len(after)) if found else None

    def _by_change(self, prompt: str, asked: Sequence[Message], index: int, tools: Sequence[Any] | None) -> Span:
        """A turn's text as what changes in the prompt if it is another, with the EOS that may follow.

        For templates that render the last turn unlike earlier ones, such as those that drop earlier reasoning.
        """
        content = (asked[index].get("content") or "").strip()
        if content:
            mark = next(character for character in "xyz" if character not in (content[0], content[-1]))
            changed = {**asked[index], "content": mark + content + mark}
            other = self._render([*asked[:index], changed, *asked[index + 1 :]], tools, ask=True)
            start = len(commonprefix([prompt, other]))
            end = start + len(content)
            if other == prompt[:start] + mark + content + mark + prompt[end:] and prompt[start:end] == content:
                return start, end + len(self.eos) if prompt.startswith(self.eos, end) else end
        raise InputError(
            f"the chat template does not show where the assistant's turn (message {index + 1}) begins and ends; use a "
            "template with {% generation %}, or data.loss_on=completion to learn the last turn alone"
        )
