"""Near-duplicates: documents that share most of their word shingles (Broder 1997)."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from functools import lru_cache
from tempfile import SpooledTemporaryFile
from typing import Any

import numpy as np
from numpy.typing import NDArray

from atp.data.arrow import Rows, at_once, values_of
from atp.data.examples import Example, Pool, Stored, joined, values
from atp.data.splits import words_of

SHINGLE = 5  # words
OVERLAP = 0.5  # shared shingles as a share of the shorter document's
AT_LEAST = 3  # shared shingles: seven words in a row
# A shingle in more documents than both of these is boilerplate, such as an instruction before every question.
COMMON_DOCUMENTS, COMMON_SHARE = 20, 0.01

_BUCKETS = 256  # where there are more characters than this, else one
_CHARACTERS = 2**24
_BUCKET_BYTES = 2**18  # of a bucket that stay in memory
_PAIRS = 2**21  # that are looked at together
_FACTORS = np.cumprod(np.full(SHINGLE, 0x9E3779B97F4A7C15, np.uint64))  # odd: products lose no bit of a word's hash
_ENTRY = np.dtype([("shingle", np.uint64), ("document", np.int64)])

Shingles = NDArray[np.uint64]


def near_duplicates(
    candidates: Sequence[Example], protected: Sequence[Example], background: Sequence[Example] = ()
) -> set[str]:
    """Ids of candidate documents that overlap with a protected document without being identical to it.

    Overlap is relative to the shorter of the two, so that excerpts of long documents are found. background: further
    examples of the data set, which show its boilerplate. Exact, but for equal hashes of 64 bits.

    Shingles are sorted into buckets, on disk where they are many. A prefix filter (Chaudhuri et al. 2006) finds pairs:
    documents that share half of the shorter one's shingles share one of its rarer half, so only those are looked up.
    """
    if not candidates or not protected:
        return set()
    documents = _Documents(candidates, protected, background)
    with ExitStack() as stack:
        buckets = [stack.enter_context(SpooledTemporaryFile(_BUCKET_BYTES)) for _ in range(documents.buckets)]
        for entries in documents.entries():
            bucket_of = (entries["shingle"] >> np.uint64(32)) % np.uint64(len(buckets))
            entries = entries[np.argsort(bucket_of, kind="stable")]
            ends = np.cumsum(np.bincount(bucket_of.astype(np.int64), minlength=len(buckets)))
            for bucket, part in zip(buckets, np.split(entries, ends[:-1]), strict=True):
                bucket.write(part.tobytes())
        for bucket in buckets:
            documents.count(_Groups(bucket))
        documents.choose_prefixes()
        for bucket in buckets:
            for pairs in documents.pairs(_Groups(bucket)):
                documents.compare(pairs)
    documents.examples.close()
    _hash.cache_clear()
    return {documents.names[number] for number in np.flatnonzero(documents.near)}


class _Groups:
    """The entries of one bucket, one per shingle and document, sorted by shingle."""

    def __init__(self, bucket: SpooledTemporaryFile[bytes]) -> None:
        bucket.seek(0)
        entries = np.frombuffer(bucket.read(), _ENTRY)
        order = np.lexsort((entries["document"], entries["shingle"]))
        shingle, document = entries["shingle"][order], entries["document"][order]
        begins, first = np.ones((2, len(order)), bool)
        begins[1:] = shingle[1:] != shingle[:-1]
        first[1:] = begins[1:] | (document[1:] != document[:-1])
        self.shingle, self.document, begins = shingle[first], document[first], begins[first]
        self.group = np.cumsum(begins) - 1
        self.frequency = np.bincount(self.group)[self.group]  # documents that hold the entry's shingle


class _Documents:
    """All documents by number, and what is known of their shingles."""

    def __init__(self, candidates: Sequence[Example], protected: Sequence[Example], background: Sequence[Example]):
        every = joined(candidates, protected, background)
        if not isinstance(every, Stored):
            every = list({id(example): example for example in every}.values())
            every = Stored([every], np.arange(len(every)))
        _, once = np.unique(every.places, return_index=True)
        self.examples = Stored(every.pools, every.places[once])
        ids = self.examples.values("document")
        self.names = list(dict.fromkeys(ids))
        number = {name: index for index, name in enumerate(self.names)}
        self.of_example = np.fromiter((number[name] for name in ids), np.int64, len(ids))
        self.protected, self.candidate, self.near = np.zeros((3, len(self.names)), bool)
        self.protected[[number[name] for name in values(protected, "document")]] = True
        self.candidate[[number[name] for name in values(candidates, "document")]] = True
        self.candidate &= ~self.protected
        self.most = max(COMMON_DOCUMENTS, COMMON_SHARE * len(self.names))
        size = self.examples.size
        self.buckets, self.at_once = _BUCKETS if size > _CHARACTERS else 1, at_once(size, len(self.examples))
        # Of each document: shingles that are no boilerplate, by the power of two that their frequency reaches.
        self.ladder = np.zeros((len(self.names), int(self.most).bit_length() + 1), np.int32)
        self.common: list[Shingles] = []
        self.by_document = np.argsort(self.of_example, kind="stable")
        self.ends = np.cumsum(np.bincount(self.of_example, minlength=len(self.names)))

    def entries(self) -> Iterator[NDArray[Any]]:
        """All shingles with the number of the document that holds them."""
        for start in range(0, len(self.examples), self.at_once):
            places = np.arange(start, min(start + self.at_once, len(self.examples)))
            for shingles, counts, where in self._shingles(places):
                entries = np.empty(len(shingles), _ENTRY)
                entries["shingle"] = shingles
                entries["document"] = np.repeat(self.of_example[where], counts)
                yield entries

    def count(self, groups: _Groups) -> None:
        """Adds to ladder and boilerplate."""
        rare = groups.frequency <= self.most
        steps = np.ceil(np.log2(groups.frequency[rare])).astype(np.int64)
        np.add.at(self.ladder, (groups.document[rare], steps), 1)
        self.common.append(np.unique(groups.shingle[~rare]))

    def choose_prefixes(self) -> None:
        """Up to which frequency the shingles of each document are looked up: so many that one must be shared."""
        reached = np.cumsum(self.ladder, axis=1)
        self.rare = reached[:, -1].astype(np.int64)
        enough = self.rare - self.needed(self.rare) + 1
        self.looked_up = 2 ** np.argmax(reached >= enough[:, None], axis=1)
        self.boilerplate = np.sort(np.concatenate(self.common))

    def needed(self, shorter: NDArray[np.int64]) -> NDArray[np.int64]:
        """Shared shingles that make a pair near, by the number of the shorter one's."""
        return np.maximum(np.ceil(OVERLAP * shorter).astype(np.int64), AT_LEAST)

    def pairs(self, groups: _Groups) -> Iterator[NDArray[np.int64]]:
        """Pairs (candidate, protected), int64 [n, 2], that share a shingle of the prefix of the shorter one."""
        rare, document = groups.frequency <= self.most, groups.document
        listed = rare & (groups.frequency <= self.looked_up[document])
        ours, theirs = rare & self.candidate[document] & ~self.near[document], rare & self.protected[document]
        for left, right, turn in ((ours & listed, theirs, 1), (theirs & listed, ours, -1)):
            for found in _joined(groups, left, right):
                found = found[self.rare[found[:, 0]] <= self.rare[found[:, 1]]]
                yield np.unique(found[:, ::turn], axis=0)

    def compare(self, pairs: NDArray[np.int64]) -> None:
        """Notes the candidates among the pairs that are near-duplicates."""
        for start in range(0, len(pairs), self.at_once):
            some = pairs[start : start + self.at_once]
            some = some[~self.near[some[:, 0]]]
            held = self._held(np.unique(some))
            for candidate, other in some.tolist():
                if not self.near[candidate]:
                    shared = len(np.intersect1d(held[candidate], held[other], assume_unique=True))
                    shorter = np.minimum(self.rare[candidate], self.rare[other])
                    self.near[candidate] = shared >= self.needed(shorter)

    def _held(self, numbers: Rows) -> dict[int, Shingles]:
        """The shingles of documents without boilerplate, each once."""
        found: dict[int, list[Shingles]] = {number: [] for number in numbers.tolist()}
        begins = np.concatenate([[0], self.ends])
        places = [self.by_document[begins[number] : begins[number + 1]] for number in found]
        if places:
            for shingles, counts, where in self._shingles(np.concatenate(places)):
                for place, part in zip(where.tolist(), np.split(shingles, np.cumsum(counts)[:-1]), strict=True):
                    found[int(self.of_example[place])].append(part)
        held = {number: np.unique(np.concatenate(parts)) for number, parts in found.items()}
        return {n: s[~np.isin(s, self.boilerplate, assume_unique=True)] for n, s in held.items()}

    def _shingles(self, places: Rows) -> Iterator[tuple[Shingles, Rows, Rows]]:
        """(shingles one after another, how many each example has, places of these examples), pool by pool."""
        for pool, rows, where in self.examples.by_pool(self.examples.places[places]):
            if isinstance(pool, Pool):
                shingles, counts = values_of(shingled(pool).take(rows, ["shingles"]), "shingles")
            else:
                parts = [shingles_of(pool[row].source) for row in rows]
                shingles, counts = np.concatenate(parts), np.array([len(part) for part in parts])
            yield shingles, counts, places[where]


def _joined(groups: _Groups, left: NDArray[np.bool_], right: NDArray[np.bool_]) -> Iterator[NDArray[np.int64]]:
    """Documents (of left, of right), int64 [n, 2], of all pairs of entries with the same shingle, some at a time."""
    count = np.bincount(groups.group[right], minlength=int(groups.group[-1]) + 1 if len(groups.group) else 0)
    begins = np.cumsum(count) - count
    of_right, wanted = groups.document[right], np.flatnonzero(left)
    wanted = wanted[count[groups.group[wanted]] > 0]
    each = count[groups.group[wanted]]
    parts = np.cumsum(each) // _PAIRS
    for part in np.unique(parts):
        here, times = wanted[parts == part], each[parts == part]
        place = np.arange(times.sum()) - np.repeat(np.cumsum(times) - times, times)
        right_ones = of_right[np.repeat(begins[groups.group[here]], times) + place]
        yield np.stack([np.repeat(groups.document[here], times), right_ones], axis=1)


def shingles_of(text: str) -> Shingles:
    """Hashes of all runs of SHINGLE words, each once; a shorter text is one shingle."""
    hashes = [_hash(word) for word in words_of(text)]
    words = np.array(hashes, np.uint64)
    runs = max(len(words) - SHINGLE + 1, 1)
    found = np.zeros(runs, np.uint64)
    for factor, start in zip(_FACTORS, range(min(SHINGLE, len(words))), strict=False):
        found += words[start : start + runs] * factor
    return np.unique(found)


def shingled(pool: Pool) -> Any:
    """The shingles of a pool's examples: a table with one column."""
    import datasets

    return pool.derived("shingles", _shingles_of_batch, {"shingles": datasets.List(datasets.Value("uint64"))})


def _shingles_of_batch(batch: dict[str, list[Any]]) -> dict[str, list[Shingles]]:
    texts = zip(batch["passage"], batch["prompt"], batch["completion"], strict=True)
    return {"shingles": [shingles_of(passage or prompt + completion) for passage, prompt, completion in texts]}


@lru_cache(2**18)
def _hash(word: str) -> int:
    return int.from_bytes(hashlib.blake2b(word.encode("utf-8", "surrogatepass"), digest_size=8).digest())
