"""The tokens of documents: arrays in memory, or tables of stored examples."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import Any, Literal, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from atp.data.arrow import Rows, at_once, values_of
from atp.data.batches import IGNORE
from atp.data.encoding import common_prefix, encode, rules_of, start_ids, token_spans
from atp.data.examples import Example, Pool, Stored, example_of
from atp.ground.errors import InputError

LossOn = Literal["all", "completion", "assistant"]
Document = tuple[NDArray[np.int32], NDArray[np.int32]]
"""Token ids and labels of a document."""
_AT_ONCE = 1000  # documents whose tokens are Python numbers at a time, which take ten times the memory of arrays
_SHORT = 2**16  # ids below this take two bytes


class Documents(Protocol):
    """Tokenized documents in order."""

    @property
    def lengths(self) -> Rows:
        """Tokens of each."""

    def read(self, numbers: Rows) -> list[Document]:
        """The documents with these numbers."""

    def close(self) -> None:
        """Lets go of the memory that reading took, until they are read again."""


class Listed:
    """Documents in memory."""

    def __init__(self, documents: Sequence[Document]) -> None:
        self.documents = documents
        self.lengths = np.array([len(ids) for ids, _ in documents], np.int64)

    def read(self, numbers: Rows) -> list[Document]:
        return [self.documents[number] for number in numbers]

    def close(self) -> None:
        """Nothing: they stay in memory."""


class Tabled:
    """Documents in tables, one for each pool of stored examples."""

    def __init__(self, examples: Stored, tokenizer: PreTrainedTokenizerBase, loss_on: LossOn) -> None:
        self.examples = examples
        self._documents: dict[int, Listed] = {}
        self._tables: dict[int, Any] = {}
        for pool, _, _ in examples.by_pool():
            if isinstance(pool, Pool):
                self._tables[id(pool)] = tokenized(pool, tokenizer, loss_on)
            else:
                self._documents[id(pool)] = Listed(documents_of(pool, tokenizer, loss_on))

    @cached_property
    def lengths(self) -> Rows:
        found = np.zeros(len(self.examples), np.int64)
        for pool, rows, where in self.examples.by_pool():
            if isinstance(pool, Pool):
                known = np.array(self._tables[id(pool)].column("tokens"), np.int64)
            else:
                known = self._documents[id(pool)].lengths
            found[where] = known[rows]
        return found

    def read(self, numbers: Rows) -> list[Document]:
        found: list[Any] = [None] * len(numbers)
        for pool, rows, where in self.examples.by_pool(self.examples.places[numbers]):
            listed = self._documents.get(id(pool))
            read = _rows_of(self._tables[id(pool)], rows) if listed is None else listed.read(rows)
            for place, document in zip(where.tolist(), read, strict=True):
                found[place] = document
        return found

    def close(self) -> None:
        self.examples.close()


class Pieces(torch.utils.data.Dataset):
    """Samples made of pieces of documents, read when they are asked for.

    Items are dicts of input_ids and labels, int64 [length of the sample], and position_ids, restarting with every
    piece, if documents are kept apart; no loss then crosses a boundary. longer: number of documents with more tokens
    than a sample may have.
    """

    def __init__(
        self, documents: Documents, document: Rows, start: Rows, stop: Rows, sample: Rows, *, apart: bool,
        longer: int = 0, ragged: bool = False,
    ) -> None:  # fmt: skip
        """Piece k is tokens start[k] .. stop[k] - 1 of document[k], in the sample with number sample[k].

        int64 [pieces] each, by sample. Samples without a loss are dropped. ragged: samples differ in length, which
        `lengths` then lists; it is None otherwise. Raises `InputError` if no sample has a loss.
        """
        self.documents, self.apart, self.longer = documents, apart, longer
        self.document_lengths = documents.lengths
        self._document, self._start, self._stop = document, start, stop
        self._begins = np.searchsorted(sample, np.arange(int(sample[-1]) + 2))
        self._samples = np.arange(len(self._begins) - 1)
        kept = np.array([bool((labels[1:] != IGNORE).any()) for _, labels, _ in self._read_all()], bool)
        if not kept.any():
            raise InputError("no token has a loss: add completions, or use loss_on 'all'")
        self._samples = self._samples[kept]
        sizes = np.add.reduceat(stop - start, self._begins[:-1])[kept]
        self.lengths: list[int] | None = sizes.tolist() if ragged else None
        self.tokens = int(sizes.sum())

    def __len__(self) -> int:
        return len(self._samples)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return self._item(*next(self._read(self._samples[[index]])))

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        return (self._item(*sample) for sample in self._read_all())

    def _item(self, ids: NDArray[Any], labels: NDArray[Any], positions: NDArray[Any]) -> dict[str, Tensor]:
        found = {
            "input_ids": torch.as_tensor(ids, dtype=torch.long),
            "labels": torch.as_tensor(labels, dtype=torch.long),
        }
        return found | ({"position_ids": torch.as_tensor(positions)} if self.apart else {})

    def _read_all(self) -> Iterator[tuple[NDArray[Any], NDArray[Any], NDArray[Any]]]:
        step = at_once(int(self.document_lengths.sum()), len(self.document_lengths))
        for start in range(0, len(self._samples), step):
            yield from self._read(self._samples[start : start + step])
        self.documents.close()

    def _read(self, samples: Rows) -> Iterator[tuple[NDArray[Any], NDArray[Any], NDArray[Any]]]:
        """Ids, labels and positions of some samples."""
        bounds = [(self._begins[sample], self._begins[sample + 1]) for sample in samples]
        numbers = np.unique(np.concatenate([self._document[begin:end] for begin, end in bounds]))
        documents = dict(zip(numbers.tolist(), self.documents.read(numbers), strict=True))
        for begin, end in bounds:
            ids, labels, positions = [], [], []
            for piece in range(begin, end):
                part = slice(self._start[piece], self._stop[piece])
                whole_ids, whole_labels = documents[int(self._document[piece])]
                ids.append(whole_ids[part])
                labels.append(whole_labels[part].copy())
                if self.apart:
                    labels[-1][:1] = IGNORE
                positions.append(np.arange(part.stop - part.start))
            yield np.concatenate(ids), np.concatenate(labels), np.concatenate(positions)


def documents_of(examples: Sequence[Example], tokenizer: PreTrainedTokenizerBase, loss_on: LossOn) -> list[Document]:
    """Ids and labels of every example, including BOS (if the tokenizer adds one) and EOS."""
    parts = (examples[begin : begin + _AT_ONCE] for begin in range(0, len(examples), _AT_ONCE))
    return [document for part in parts for document in _encoded(part, tokenizer, loss_on)]


def tokenized(pool: Pool, tokenizer: PreTrainedTokenizerBase, loss_on: LossOn) -> Any:
    """A table of the tokens of a pool's examples.

    ids: uint16, or int32 for a large vocabulary; scored: whether a token's label is the token; tokens: their number.
    """
    import datasets

    width = "uint16" if max(tokenizer.get_vocab().values(), default=0) < _SHORT else "int32"
    facts = json.dumps([rules_of(tokenizer), tokenizer.special_tokens_map, loss_on, width], default=str)
    features = {
        "ids": datasets.List(datasets.Value(width)),
        "scored": datasets.List(datasets.Value("bool")),
        "tokens": datasets.Value("int32"),
    }
    name = f"tokens-{hashlib.sha256(facts.encode('utf-8', 'surrogatepass')).hexdigest()[:16]}"
    return pool.derived(name, _Tokenize(tokenizer, loss_on, width), features)


class _Tokenize:
    def __init__(self, tokenizer: PreTrainedTokenizerBase, loss_on: LossOn, width: str) -> None:
        self.tokenizer, self.loss_on, self.width = tokenizer, loss_on, width

    def __call__(self, batch: dict[str, list[Any]]) -> dict[str, list[Any]]:
        records = (dict(zip(batch, row, strict=True)) for row in zip(*batch.values(), strict=True))
        found = list(_encoded([example_of(record) for record in records], self.tokenizer, self.loss_on))
        return {
            "ids": [ids.astype(self.width) for ids, _ in found],
            "scored": [labels != IGNORE for _, labels in found],
            "tokens": [len(ids) for ids, _ in found],
        }


def _rows_of(table: Any, rows: Rows) -> list[Document]:
    read = table.take(rows, ["ids", "scored"])
    (ids, counts), (scored, _) = values_of(read, "ids"), values_of(read, "scored")
    ids = ids.astype(np.int32)
    ends = np.cumsum(counts)[:-1]
    return list(zip(np.split(ids, ends), np.split(np.where(scored, ids, np.int32(IGNORE)), ends), strict=True))


def _encoded(examples: Sequence[Example], tokenizer: PreTrainedTokenizerBase, loss_on: LossOn) -> Iterator[Document]:
    start = start_ids(tokenizer)
    texts = encode(tokenizer, (e.text for e in examples))
    skip = [0] * len(examples)
    if loss_on != "all":
        answered = [index for index, example in enumerate(examples) if example.completion]
        prompts = encode(tokenizer, (examples[index].prompt for index in answered))
        for index, prompt in zip(answered, prompts, strict=True):
            skip[index] = common_prefix([prompt, texts[index]])
    for example, text, skipped in zip(examples, texts, skip, strict=True):
        ended = [*text, tokenizer.eos_token_id]
        labels = [IGNORE] * skipped + ended[skipped:]
        if loss_on == "assistant" and example.turns:
            for first, last in token_spans(tokenizer, example.text, example.turns):
                labels[first:last] = text[first:last]
        yield np.array(start + ended, np.int32), np.array([IGNORE] * len(start) + labels, np.int32)
