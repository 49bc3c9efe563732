"""From documents to samples: windows of equal length, joined or with boundaries, or one document per row."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import accumulate
from typing import Literal

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerBase

from atp.data.batches import IGNORE
from atp.data.encoding import common_prefix, encode, start_ids, token_spans
from atp.data.splits import Example
from atp.errors import InputError

Packing = Literal["joined", "separate", "padded"]
LossOn = Literal["all", "completion", "assistant"]
_Document = tuple[NDArray[np.int32], NDArray[np.int32]]
_AT_ONCE = 1000  # documents whose tokens are Python numbers at a time, which take ten times the memory of arrays


class PackedDataset(Dataset):
    """Windows of tokens, ready for `atp.data.collate`.

    input_ids, labels: int64 [windows, length]; a label is the token at the same position (the model shifts), or -100
    where no loss is taken. position_ids: int64 [windows, length], restarting at every document, if documents are kept
    apart; None if they see the ones before them. longer: number of documents with more tokens than a window.
    Items are dicts of these, [length] each.
    """

    def __init__(self, input_ids: Tensor, labels: Tensor, position_ids: Tensor | None = None, longer: int = 0):
        self.input_ids = input_ids
        self.labels = labels
        self.position_ids = position_ids
        self.longer = longer

    def __len__(self) -> int:
        return len(self.input_ids)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        item = {"input_ids": self.input_ids[index], "labels": self.labels[index]}
        return item if self.position_ids is None else item | {"position_ids": self.position_ids[index]}

    @property
    def tokens(self) -> int:
        """Tokens in all windows."""
        return self.input_ids.numel()


class RaggedDataset(Dataset):
    """One document per sample, unpadded: dicts of input_ids and labels, int64 [its length].

    longer: number of documents that lost their beginning.
    """

    def __init__(self, documents: Sequence[tuple[ArrayLike, ArrayLike]], longer: int = 0):
        self.longer = longer
        self._documents = [
            tuple(torch.as_tensor(part, dtype=torch.long) for part in document) for document in documents
        ]
        self.lengths = [len(ids) for ids, _ in self._documents]

    def __len__(self) -> int:
        return len(self._documents)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        input_ids, labels = self._documents[index]
        return {"input_ids": input_ids, "labels": labels}


def pack(
    examples: Sequence[Example],
    tokenizer: PreTrainedTokenizerBase,
    length: int,
    *,
    loss_on: LossOn = "all",
    separate: bool = False,
) -> PackedDataset:
    """Tokenizes the examples in order, ends each with EOS, joins them and cuts windows of `length` tokens.

    loss_on "completion" takes the loss on completions and their EOS only, "assistant" also on the earlier answers of a
    conversation (`Example.turns`); plain text, which has no completion, is trained on whole. separate: positions
    restart at every document and window, and no loss crosses a boundary.
    Windows without a loss are dropped. The last partial window is dropped, or padded if it is the only one.
    Raises `InputError` for no examples, a tokenizer without EOS, or windows in which no token has a loss.
    """
    documents = _documents(examples, tokenizer, length, loss_on)
    ids, labels = (np.concatenate(parts) for parts in zip(*documents, strict=True))
    starts = list(accumulate((len(document) for document, _ in documents), initial=0))
    if len(ids) < length:
        missing = (0, length - len(ids))
        ids = np.pad(ids, missing, constant_values=tokenizer.eos_token_id)
        labels = np.pad(labels, missing, constant_values=IGNORE)
    windows = len(ids) // length
    packed_ids, packed_labels = (
        torch.as_tensor(part[: windows * length], dtype=torch.long).view(windows, length) for part in (ids, labels)
    )
    positions = _positions(starts, windows, length) if separate else None
    if positions is not None:
        packed_labels = packed_labels.masked_fill(positions == 0, IGNORE)
    scored = (packed_labels[:, 1:] != IGNORE).any(dim=1)
    if not scored.any():
        raise InputError("no token has a loss: add completions, or use loss_on 'all'")
    positions = None if positions is None else positions[scored]
    return PackedDataset(packed_ids[scored], packed_labels[scored], positions, _longer(documents, length))


def unpacked(
    examples: Sequence[Example], tokenizer: PreTrainedTokenizerBase, length: int, *, loss_on: LossOn = "all"
) -> RaggedDataset:
    """One example per sample, ending in EOS; longer ones keep their last `length` tokens.

    Examples without a loss are dropped. Raises `InputError` like `pack`.
    """
    documents = _documents(examples, tokenizer, length, loss_on)
    cut = [(ids[-length:], labels[-length:]) for ids, labels in documents]
    scored = [document for document in cut if (document[1][1:] != IGNORE).any()]
    if not scored:
        raise InputError("no token has a loss: add completions, or use loss_on 'all'")
    return RaggedDataset(scored, longer=_longer(documents, length))


def _longer(documents: Sequence[_Document], length: int) -> int:
    return sum(len(ids) > length for ids, _ in documents)


def _documents(
    examples: Sequence[Example], tokenizer: PreTrainedTokenizerBase, length: int, loss_on: LossOn
) -> list[_Document]:
    """Ids and labels of every document, including BOS (if the tokenizer adds one) and EOS."""
    if not examples:
        raise InputError("nothing to pack: the split has no examples")
    if length < 2:
        raise InputError(f"a window of {length} token(s) has nothing to predict: make data.length at least 2")
    if tokenizer.eos_token_id is None:
        raise InputError("the tokenizer has no EOS token to separate documents: set tokenizer.eos_token")
    parts = (examples[begin : begin + _AT_ONCE] for begin in range(0, len(examples), _AT_ONCE))
    return [document for part in parts for document in _encoded(part, tokenizer, loss_on)]


def _encoded(examples: Sequence[Example], tokenizer: PreTrainedTokenizerBase, loss_on: LossOn) -> Iterator[_Document]:
    start = start_ids(tokenizer)
    texts = encode(tokenizer, (e.text for e in examples))
    skip = [0] * len(examples)
    if loss_on != "all":
        prompts = encode(tokenizer, (e.prompt for e in examples))
        for index, (example, prompt, text) in enumerate(zip(examples, prompts, texts, strict=True)):
            skip[index] = common_prefix([prompt, text]) if example.completion else 0
    for example, text, skipped in zip(examples, texts, skip, strict=True):
        ended = [*text, tokenizer.eos_token_id]
        labels = [IGNORE] * skipped + ended[skipped:]
        if loss_on == "assistant" and example.turns:
            for first, last in token_spans(tokenizer, example.text, example.turns):
                labels[first:last] = text[first:last]
        yield np.array(start + ended, np.int32), np.array([IGNORE] * len(start) + labels, np.int32)


def _positions(starts: list[int], windows: int, length: int) -> Tensor:
    """Position of every token in its document, or in the part of it that its window holds: int64 [windows, length]."""
    index = torch.arange(windows * length)
    begins = index % length == 0
    begins[[start for start in starts if start < len(index)]] = True
    return (index - torch.where(begins, index, 0).cummax(0).values).view(windows, length)
