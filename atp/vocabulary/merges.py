"""A BPE vocabulary as its merges: from which two tokens each token is joined, and what has to stay with it.

BPE joins the pair of neighbours with the lowest rank until no pair has a merge. So a text whose words are all kept has
the same tokens under fewer merges if, for each of its tokens, the merges that join that token stay: whatever else
could have been joined earlier is not in the way, and these merges keep their order. Which merges join a token does not
depend on what stands beside it, because nothing was joined across its borders before. `parents` therefore tells the
last of them by joining the token alone.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from typing import Any

from transformers import PreTrainedTokenizerBase

from atp.ground.errors import InputError, shorten

SPACE = "\u2581"  # stands for a space in sentencepiece vocabularies
_BYTES = frozenset(f"<0x{byte:02X}>" for byte in range(256))
_REMEDY = (
    "set vocabulary.keep=null, or give a model with a byte-level or sentencepiece BPE tokenizer, as Llama, Mistral, "
    "Qwen, Gemma and SmolLM have it"
)


class Merges:
    """The tokens of a byte-level or sentencepiece BPE tokenizer, with what joins them.

    content: the tokenizer as its tokenizer.json. ids: of every token, added ones included. ranks: of every pair that
    has a merge; lower ones are joined first. Raises `InputError` for tokenizers of other kinds.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        core = getattr(tokenizer, "backend_tokenizer", None)
        if core is None:
            raise _refused(tokenizer, "it has no tokenizer.json form")
        self.content: dict[str, Any] = json.loads(core.to_str())
        self.model: dict[str, Any] = self.content["model"]
        if (why := _unlike(self.content)) is not None:
            raise _refused(tokenizer, why)
        self.is_byte_level = not self.model.get("byte_fallback")
        self.added: dict[str, int] = {token["content"]: token["id"] for token in self.content["added_tokens"]}
        self.ids: dict[str, int] = self.model["vocab"] | self.added
        self.tokens = {index: token for token, index in self.ids.items()}
        if len(self.tokens) < len(self.ids):
            double = next(token for token, index in self.ids.items() if self.tokens[index] != token)
            raise _refused(tokenizer, f"the id of '{shorten(double)}' is also that of another token")
        self.ranks: dict[tuple[str, str], int] = {}
        self._ways: dict[str, list[tuple[str, str]]] = {}
        for rank, pair in enumerate(pairs(self.model)):
            if pair not in self.ranks:
                self._ways.setdefault(pair[0] + pair[1], []).append(pair)
            self.ranks[pair] = rank  # of a pair that is listed twice the last one counts in tokenizers
        self._parents: dict[int, tuple[int, ...]] = {}

    def rank(self, token: int) -> int:
        """The place of a token in the order of learning: that of the first merge to it, before all others if none."""
        ways = self._ways.get(self.tokens[token])
        return -1 if ways is None else self.ranks[ways[0]]

    def parents(self, token: int) -> tuple[int, ...]:
        """The two tokens whose merge gives this one; none for single characters and tokens that no merge gives."""
        if token not in self._parents:
            ways = self._ways.get(self.tokens[token], [])
            pair = self._last(self.tokens[token]) if len(ways) > 1 else next(iter(ways), None)
            self._parents[token] = () if pair is None else (self.ids[pair[0]], self.ids[pair[1]])
        return self._parents[token]

    def closed(self, tokens: Iterable[int]) -> set[int]:
        """These tokens with all that they are joined from."""
        found: set[int] = set()
        left = list(tokens)
        while left:
            if (token := left.pop()) not in found:
                found.add(token)
                left.extend(self.parents(token))
        return found

    def always(self) -> set[int]:
        """The tokens without which some texts would not encode or would not read: letters, bytes, and added tokens.

        A sentencepiece vocabulary spells a letter that it lacks in bytes, so its letters may go if it has all of them.
        """
        vocabulary = self.model["vocab"]
        stay = {token for token in vocabulary if len(token) == 1}
        if not self.is_byte_level:
            spelled = vocabulary.keys() & _BYTES
            stay = spelled | (stay & {SPACE} if len(spelled) == len(_BYTES) else stay)
        unknown = self.model.get("unk_token")
        found = {self.ids[token] for token in stay} | {*self.added.values(), *template_ids(self.content)}
        return found | ({self.ids[unknown]} if unknown in self.ids else set())

    def _last(self, token: str) -> tuple[str, str] | None:
        """The merge that comes last when a token is joined from its characters; any merge to it if they never join."""
        parts, last = list(token), None
        while len(parts) > 1:
            ranked = ((self.ranks.get(pair), place) for place, pair in enumerate(zip(parts, parts[1:], strict=False)))
            best = min(((rank, place) for rank, place in ranked if rank is not None), default=None)
            if best is None:
                return self._ways[token][0]
            place = best[1]
            last = (parts[place], parts[place + 1])
            parts[place : place + 2] = [last[0] + last[1]]
        return last


def pairs(model: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """The merges of a BPE model in tokenizer.json, the first to apply first; older files hold them as text."""
    for merge in model["merges"]:
        first, second = merge.split(" ", 1) if isinstance(merge, str) else merge
        yield first, second


def template_ids(content: dict[str, Any]) -> Iterator[int]:
    """Ids that a tokenizer.json names where it says what surrounds a text and what pads it."""
    for step in processors(content.get("post_processor")):
        for special in (step.get("special_tokens") or {}).values():
            yield from special["ids"]
        yield from (step[key][1] for key in ("sep", "cls") if key in step)
    if content.get("padding"):
        yield content["padding"]["pad_id"]


def processors(processor: dict[str, Any] | None) -> Iterator[dict[str, Any]]:
    """The steps of a post-processor, sequences taken apart."""
    if processor is None:
        return
    if processor["type"] != "Sequence":
        yield processor
        return
    for step in processor["processors"]:
        yield from processors(step)


def _unlike(content: dict[str, Any]) -> str | None:
    """What makes a tokenizer neither byte-level nor sentencepiece BPE; None if it is one of them."""
    model = content["model"]
    if model.get("type") != "BPE":
        return f"its vocabulary is {model.get('type')} and not BPE"
    for key in ("dropout", "continuing_subword_prefix", "end_of_word_suffix"):
        if model.get(key):
            return f"its BPE uses {key}"
    steps = json.dumps([content.get("normalizer"), content.get("pre_tokenizer")])
    is_byte_level = re.search(r'"type": ?"ByteLevel"', steps) is not None
    if is_byte_level == bool(model.get("byte_fallback")):
        return "it splits texts neither into bytes nor into characters with bytes for those that it lacks"
    return None


def _refused(tokenizer: PreTrainedTokenizerBase, why: str) -> InputError:
    return InputError(f"the vocabulary of this model cannot be trimmed, because of its tokenizer: {why}: {_REMEDY}")
