"""From documents to samples: windows of equal length, joined or with boundaries, whole documents, one document."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterator, Sequence
from itertools import accumulate

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerBase

from atp.data.arrow import Rows
from atp.data.batches import IGNORE
from atp.data.examples import Example, Stored
from atp.data.tokens import Document, Documents, Listed, LossOn, Pieces, Tabled, documents_of
from atp.ground.errors import InputError


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

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        return (self[index] for index in range(len(self)))

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

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        return (self[index] for index in range(len(self)))

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
) -> PackedDataset | Pieces:
    """Tokenizes the examples in order, ends each with EOS, joins them and cuts windows of `length` tokens.

    loss_on "completion" takes the loss on completions and their EOS only, "assistant" also on the earlier answers of a
    conversation (`Example.turns`); plain text, which has no completion, is trained on whole. separate: positions
    restart at every document and window, and no loss crosses a boundary.
    Windows without a loss are dropped. The last partial window is dropped, or padded if it is the only one.
    Stored examples give `Pieces` with the same items.
    Raises `InputError` for no examples, a tokenizer without EOS, or windows in which no token has a loss.
    """
    check(examples, tokenizer, length)
    if isinstance(examples, Stored):
        return _windows(Tabled(examples, tokenizer, loss_on), length, separate)
    documents = documents_of(examples, tokenizer, loss_on)
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
) -> RaggedDataset | Pieces:
    """One example per sample, ending in EOS; longer ones keep their last `length` tokens.

    Examples without a loss are dropped. Stored examples give `Pieces` with the same items. Raises `InputError` like
    `pack`.
    """
    check(examples, tokenizer, length)
    if isinstance(examples, Stored):
        tokens = Tabled(examples, tokenizer, loss_on)
        sizes, places = tokens.lengths, np.arange(len(examples))
        return Pieces(
            tokens, places, np.maximum(sizes - length, 0), sizes, places, apart=False,
            longer=int((sizes > length).sum()), ragged=True,
        )  # fmt: skip
    documents = documents_of(examples, tokenizer, loss_on)
    cut = [(ids[-length:], labels[-length:]) for ids, labels in documents]
    scored = [document for document in cut if (document[1][1:] != IGNORE).any()]
    if not scored:
        raise InputError("no token has a loss: add completions, or use loss_on 'all'")
    return RaggedDataset(scored, longer=_longer(documents, length))


def fitted(
    examples: Sequence[Example], tokenizer: PreTrainedTokenizerBase, length: int, *, loss_on: LossOn = "all"
) -> Pieces:
    """Whole examples in samples of up to `length` tokens, kept apart, by best-fit decreasing.

    The longest example goes first, each into the fullest sample that has room. Longer ones than `length` are cut into
    pieces of that length and a rest, as in Ding et al. 2024, who find fewer broken texts to make better models. Raises
    `InputError` like `pack`.
    """
    check(examples, tokenizer, length)
    tokens: Documents
    if isinstance(examples, Stored):
        tokens = Tabled(examples, tokenizer, loss_on)
    else:
        tokens = Listed(documents_of(examples, tokenizer, loss_on))
    sizes = tokens.lengths
    pieces_of = -(-sizes // length)
    document = np.repeat(np.arange(len(sizes)), pieces_of)
    start = length * (np.arange(len(document)) - np.repeat(np.cumsum(pieces_of) - pieces_of, pieces_of))
    stop = np.minimum(start + length, sizes[document])
    sample = best_fit(stop - start, length)
    order = np.argsort(sample, kind="stable")
    parts = (part[order] for part in (document, start, stop, sample))
    return Pieces(tokens, *parts, apart=True, longer=int((sizes > length).sum()), ragged=True)


def best_fit(sizes: Rows, room: int) -> Rows:
    """The bin of each item, int64 [items], by best-fit decreasing. sizes: int64 [items], at most `room` each."""
    bins = np.empty(len(sizes), np.int64)
    left: dict[int, list[int]] = {}  # room -> the bins that have it
    rooms: list[int] = []  # its keys, in order
    count = 0
    for item in np.argsort(-sizes, kind="stable").tolist():
        size = int(sizes[item])
        place = bisect_left(rooms, size)
        if place < len(rooms):
            has = rooms[place]
            number = left[has].pop()
            if not left[has]:
                del left[has], rooms[place]
        else:
            has, number, count = room, count, count + 1
        bins[item] = number
        if has > size:
            if has - size not in left:
                insort(rooms, has - size)
            left.setdefault(has - size, []).append(number)
    return bins


def check(examples: Sequence[Example], tokenizer: PreTrainedTokenizerBase, length: int) -> None:
    """Raises `InputError` for what no packing can take."""
    if not examples:
        raise InputError("nothing to pack: the split has no examples")
    if length < 2:
        raise InputError(f"a window of {length} token(s) has nothing to predict: make data.length at least 2")
    if tokenizer.eos_token_id is None:
        raise InputError("the tokenizer has no EOS token to separate documents: set tokenizer.eos_token")


def _windows(tokens: Documents, length: int, separate: bool) -> Pieces:
    """Windows over all documents in a row: pieces end where a document or a window does."""
    sizes = tokens.lengths
    starts = np.cumsum(sizes) - sizes
    end = int(sizes.sum()) // length * length
    begins = np.union1d(starts[starts < end], np.arange(0, end, length))
    document = np.searchsorted(starts, begins, side="right") - 1
    start = begins - starts[document]
    stop = np.append(begins[1:], end) - starts[document]
    longer = int((sizes > length).sum())
    return Pieces(tokens, document, start, stop, begins // length, apart=separate, longer=longer)


def _longer(documents: Sequence[Document], length: int) -> int:
    return sum(len(ids) > length for ids, _ in documents)


def _positions(starts: list[int], windows: int, length: int) -> Tensor:
    """Position of every token in its document, or in the part of it that its window holds: int64 [windows, length]."""
    index = torch.arange(windows * length)
    begins = index % length == 0
    begins[[start for start in starts if start < len(index)]] = True
    return (index - torch.where(begins, index, 0).cummax(0).values).view(windows, length)
