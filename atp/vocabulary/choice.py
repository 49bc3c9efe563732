"""Which words stay: those whose loss would cost more bits than their weights are worth.

A text takes one token more wherever a token is gone that two others spell, which costs `BITS`. So losing a token that
occurs n times in B bytes of text costs about n * BITS / B bits per byte, and saves a row of the embedding and one of
the head. It stays if as many parameters are worth no more in the decoder. What its occurrences are spelled with counts
them from then on. Of the tokens that a text does not show, a text of the same size
would show about as many as this one shows once (Good-Turing), the earlier learned ones more often (Zipf).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from itertools import islice
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from atp.data.chat import chat_of
from atp.data.encoding import encode
from atp.ground.errors import InputError
from atp.vocabulary.merges import Merges

Keep = Literal["auto"] | int
BITS = 4.0
"""What a token more costs once tuning has taught the model the new spelling; before that it is nine to ten."""
MULTIPLE = 8
"""What the number of words is rounded up to under `auto`, as matrix products on GPUs like it."""
MOST = 2**26
"""Characters of text that are counted."""
_AT_ONCE = 1000  # texts that are encoded together
_HALVINGS = 50
_CLOSE = 1e-3


def kept_words(
    tokenizer: PreTrainedTokenizerBase,
    texts: Iterable[str],
    keep: Keep,
    worth: Callable[[int], float],
    also: Iterable[int] = (),
) -> Tensor:
    """The ids to keep, int64 [words], ascending.

    texts: what the model is trained on, read up to `MOST` characters. keep: their number, or `auto`. worth: bits per
    byte that the parameters of one word would spare in the decoder if so many words stay (`atp.inputs.targets`); the
    more words, the more. also: ids that the model's config names. Letters or bytes, special and added
    tokens, what the chat template writes, and the two tokens that each kept one is joined from always stay. Raises
    `InputError` for a tokenizer that cannot be trimmed, and for a number that these alone exceed or that it does not
    have.
    """
    merges = Merges(tokenizer)
    always = merges.closed({*merges.always(), *_named(tokenizer, also), *written_by_chat(tokenizer)} & {*merges.tokens})
    if keep != "auto" and keep > len(merges.tokens):
        raise InputError(
            f"vocabulary.keep is {keep}, but the tokenizer has {len(merges.tokens)} words: set it to null, or choose a "
            "smaller number"
        )
    if keep != "auto" and keep < len(always):
        raise InputError(
            f"vocabulary.keep is {keep}, but {len(always)} words have to stay (bytes or letters, special tokens, and "
            "those of the chat template): choose at least that"
        )
    counts, size = counted(tokenizer, texts, max(merges.tokens) + 1)
    expected = expected_counts(merges, counts)
    if keep == "auto":
        kept = _balanced(merges, always, expected, lambda words: worth(words) * size / BITS)
        target = min(-(-len(kept) // MULTIPLE) * MULTIPLE, len(merges.tokens))
    else:
        kept, target = _at_most(merges, always, expected, keep), keep
    return torch.tensor(sorted(_filled(merges, kept, expected, target)), dtype=torch.long)


def counted(tokenizer: PreTrainedTokenizerBase, texts: Iterable[str], size: int) -> tuple[NDArray[np.int64], int]:
    """How often each of `size` ids occurs in the texts, int64 [size], and their length in bytes."""
    counts, length, characters = np.zeros(size, np.int64), 0, 0
    left = iter(texts)
    while characters < MOST and (part := list(islice(left, _AT_ONCE))):
        characters += sum(map(len, part))
        length += sum(len(text.encode("utf-8", "surrogatepass")) for text in part)
        for ids in encode(tokenizer, part):
            counts += np.bincount(np.array(ids, np.int64), minlength=size)
    return counts, length


def tokens_per_text(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> float:
    """The mean number of tokens, special ones left out; 0 for no texts."""
    return sum(map(len, encode(tokenizer, texts))) / len(texts) if texts else 0.0


def written_by_chat(tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """The tokens of what a chat template writes: its own text, and what it makes of short conversations."""
    templates = tokenizer.chat_template
    if templates is None:
        return set()
    texts = list(templates.values()) if isinstance(templates, dict) else [templates]
    system, asked, answered = ({"role": role, "content": "a"} for role in ("system", "user", "assistant"))
    for messages in ([asked, answered], [asked, answered, asked, answered], [system, asked, answered]):
        try:
            talk = chat_of(tokenizer)(messages)
        except InputError:  # some know no system
            continue
        texts += [talk.prompt, talk.prompt + talk.completion]
    return {token for ids in encode(tokenizer, texts) for token in ids}


def _named(tokenizer: PreTrainedTokenizerBase, also: Iterable[int]) -> set[int]:
    return {*tokenizer.all_special_ids, *also}


def expected_counts(merges: Merges, counts: NDArray[np.int64]) -> NDArray[np.float64]:
    """How often each token is to be expected in a text like that which was counted, float64 as counts."""
    expected = counts.astype(np.float64)
    ranks = {token: rank for token in merges.tokens if not counts[token] and (rank := merges.rank(token)) >= 0}
    if ranks:
        weights = 1 / (1.0 + np.array(list(ranks.values())))
        expected[list(ranks)] = (counts == 1).sum() * weights / weights.sum()
    return expected


def _above(merges: Merges, always: set[int], expected: NDArray[np.float64], least: float) -> set[int]:
    """The tokens that occur at least `least` times, with what they are joined from.

    From long tokens to short ones: those that a token is joined from are shorter, and take over its occurrences.
    """
    found, due = set(always), expected.copy()
    seen = np.flatnonzero(expected >= min(least, 1.0)).tolist()  # of others the few occurrences count for nobody
    waiting = {token for token in seen if token in merges.tokens and token not in found}
    by_length: dict[int, list[int]] = {}
    for token in waiting:
        by_length.setdefault(len(merges.tokens[token]), []).append(token)
    for length in range(max(by_length, default=0), 0, -1):
        for token in by_length.get(length, ()):
            if token in found:
                continue
            if due[token] >= least:
                found |= merges.closed([token])
                continue
            for parent in merges.parents(token):
                due[parent] += due[token]
                if parent not in waiting:
                    waiting.add(parent)
                    by_length.setdefault(len(merges.tokens[parent]), []).append(parent)
    return found


def _balanced(
    merges: Merges, always: set[int], expected: NDArray[np.float64], least: Callable[[int], float]
) -> set[int]:
    """The tokens that occur at least as often as `least` asks where just these are kept."""
    low, high = least(len(always)), min(least(len(merges.tokens)), _more_than_any(merges, expected))
    if low >= high:
        return _above(merges, always, expected, high)
    found = always
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        tried = _above(merges, always, expected, middle)
        if least(len(tried)) > middle:
            low = middle
        else:
            found, high = tried, middle
        if high - low < _CLOSE * high:
            break
    return found


def _more_than_any(merges: Merges, expected: NDArray[np.float64]) -> float:
    """More than a token can occur, those included that it is a part of."""
    return float(expected.sum()) * max(map(len, merges.tokens.values())) + 1


def _at_most(merges: Merges, always: set[int], expected: NDArray[np.float64], most: int) -> set[int]:
    """The tokens above the lowest number of occurrences that no more than `most` have."""
    low, high = 0.0, _more_than_any(merges, expected)
    found = always
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        tried = _above(merges, always, expected, middle)
        if len(tried) <= most:
            found, high = tried, middle
        else:
            low = middle
        if len(found) == most:
            break
    return found


def _filled(merges: Merges, kept: set[int], expected: NDArray[np.float64], size: int) -> set[int]:
    """The kept tokens and the most frequent others with what they are joined from, until there are `size`.

    One of the others that are left always has both tokens that it is joined from, so the number is met.
    """
    others = sorted(merges.tokens.keys() - kept, key=lambda token: (-expected[token], merges.rank(token), token))
    found = set(kept)
    for token in others:
        if len(found) == size:
            break
        needed = merges.closed([token]) - found
        if len(found) + len(needed) <= size:
            found |= needed
    return found
