"""From text to token ids, in the one way that training, perplexity and question answering share."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from transformers import PreTrainedTokenizerBase


def start_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """[bos] for a tokenizer that begins its own encodings with it, else []."""
    bos = tokenizer.bos_token_id
    return [bos] if bos is not None and tokenizer("a").input_ids[:1] == [bos] else []


def encode(tokenizer: PreTrainedTokenizerBase, texts: Iterable[str]) -> list[list[int]]:
    """Token ids of each text, with no special tokens."""
    texts = list(texts)
    return tokenizer(texts, add_special_tokens=False).input_ids if texts else []


def common_prefix(sequences: Sequence[Sequence[int]]) -> int:
    """Length of the longest common prefix.

    A prompt is not always a prefix of its tokenised continuation: the last token may merge across the border. The
    common prefix is the point from which the continuation is really predicted.
    """
    first, *others = sequences
    for position, token in enumerate(first):
        if any(len(other) <= position or other[position] != token for other in others):
            return position
    return len(first)
