"""Text -> token ids, the same way for training, perplexity and question answering."""

from __future__ import annotations

import json
import re
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from atp.ground.errors import InputError, shorten

_BYTE = re.compile("<0x[0-9A-F]{2}>")  # a piece that stands for one byte


def start_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """[bos] if the tokenizer starts its own encodings with it, else []."""
    bos = tokenizer.bos_token_id
    return [bos] if bos is not None and tokenizer("a").input_ids[:1] == [bos] else []


def rules_of(tokenizer: PreTrainedTokenizerBase) -> str:
    """How a tokenizer turns text into ids, as JSON that is the same only for the same rules."""
    core = getattr(tokenizer, "backend_tokenizer", None)
    if core is None:
        return json.dumps(sorted(tokenizer.get_vocab().items()))
    # Truncation and padding are settings of the last call.
    rules = {k: v for k, v in json.loads(core.to_str()).items() if k not in ("version", "truncation", "padding")}
    return json.dumps(rules, sort_keys=True)


def encode(tokenizer: PreTrainedTokenizerBase, texts: Iterable[str]) -> list[list[int]]:
    """Token ids of each text, without special tokens."""
    texts = list(texts)
    with _explained():
        return tokenizer(texts, add_special_tokens=False).input_ids if texts else []


@contextmanager
def _explained() -> Iterator[None]:
    """Turns a panic of the tokenizers' Rust code, which is no `Exception`, into one sentence."""
    try:
        yield
    except BaseException as error:
        if type(error).__name__ != "PanicException":
            raise
        raise InputError(
            f"the tokenizer fails on a text ({shorten(str(error))}): use the model's own tokenizer.json, or leave "
            "out rows of endless repetition"
        ) from error


def byte_lengths(tokenizer: PreTrainedTokenizerBase, ids: Tensor) -> Tensor | None:
    """Bytes of UTF-8 text that each token stands for, int64 like ids; 0 for special tokens and negative ids.

    They are those of the text as the tokenizer normalizes it. None for a tokenizer whose pieces are neither bytes
    (byte-level BPE) nor text with spaces as "\u2581" (SentencePiece).
    """
    core = getattr(tokenizer, "backend_tokenizer", None)
    if core is None or core.decoder is None:
        return None
    rules = core.decoder.__getstate__().decode()
    if '"ByteLevel"' in rules:
        count: Callable[[str], int] = len  # each character of a piece stands for a byte
    elif '"ByteFallback"' in rules or "\u2581" in rules:
        count = _piece_bytes
    else:
        return None
    distinct, places = ids.unique(return_inverse=True)
    added = tokenizer.added_tokens_decoder
    lengths = []
    for token in distinct.tolist():
        if token < 0 or token in tokenizer.all_special_ids or (token in added and added[token].special):
            lengths.append(0)
        elif token in added:
            lengths.append(len(added[token].content.encode()))
        else:
            lengths.append(count(str(tokenizer.convert_ids_to_tokens(token))))
    return torch.tensor(lengths)[places]


def _piece_bytes(piece: str) -> int:
    return 1 if _BYTE.fullmatch(piece) else len(piece.replace("\u2581", " ").encode())


def token_spans(
    tokenizer: PreTrainedTokenizerBase, text: str, spans: Sequence[tuple[int, int]]
) -> list[tuple[int, int]]:
    """First and last (exclusive) token of each span of characters, in the ids that `encode` gives for the text.

    A token that reaches over a border belongs to the span. Raises `InputError` for a tokenizer that does not say which
    characters its tokens are of.
    """
    if not tokenizer.is_fast:
        raise InputError(
            "the tokenizer does not say which characters its tokens are of, so the assistant's turns cannot be found: "
            "set data.loss_on=completion, or use a fast tokenizer (tokenizer.json)"
        )
    with _explained():
        offsets = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
    starts, ends = [start for start, _ in offsets], [end for _, end in offsets]
    return [(bisect_right(ends, start), bisect_left(starts, end)) for start, end in spans]


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
