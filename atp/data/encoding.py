"""Text -> token ids, the same way for training, perplexity and question answering."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from transformers import PreTrainedTokenizerBase


def start_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """[bos] if the tokenizer starts its own encodings with it, else []."""
    bos = tokenizer.bos_token_id
    return [bos] if bos is not None and tokenizer("a").input_ids[:1] == [bos] else []


def encode(tokenizer: PreTrainedTokenizerBase, texts: Iterable[str]) -> list[list[int]]:
    """Token ids of each text, without special tokens."""
    texts = list(texts)
    return tokenizer(texts, add_special_tokens=False).input_ids if texts else []


def common_prefix(sequences: Sequence[Sequence[int]]) -> int:
    """Length of the longest common prefix.

    A tokenized prompt need not be a prefix of the tokenized whole, since tokens may merge across the border. The
    continuation is predicted from the end of the common prefix.
    """
    first, *others = sequences
    for position, token in enumerate(first):
        if any(len(other) <= position or other[position] != token for other in others):
            return position
    return len(first)
