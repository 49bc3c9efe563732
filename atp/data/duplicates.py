"""Near-duplicates: documents that share most of their word shingles (Broder 1997)."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from itertools import chain

from atp.data.splits import Example, words_of

SHINGLE = 5  # words
OVERLAP = 0.5  # shared shingles as a share of the shorter document's
AT_LEAST = 3  # shared shingles: seven words in a row
# A shingle in more documents than both of these is boilerplate, such as an instruction before every question.
COMMON_DOCUMENTS, COMMON_SHARE = 20, 0.01


def near_duplicates(
    candidates: Sequence[Example], protected: Sequence[Example], background: Sequence[Example] = ()
) -> set[str]:
    """Ids of candidate documents that overlap with a protected document without being identical to it.

    Overlap is relative to the shorter of the two, so that excerpts of long documents are found. background: further
    examples of the data set, which show its boilerplate. Exact, using an index of the protected documents' shingles;
    time is linear in the number of words.
    """
    ours, theirs = _shingles(candidates), _shingles(protected)
    everything = {**_shingles(background), **theirs, **ours}
    frequency = Counter(chain.from_iterable(everything.values()))
    most = max(COMMON_DOCUMENTS, COMMON_SHARE * len(everything))
    common = {shingle for shingle, count in frequency.items() if count > most}
    index: dict[int, list[str]] = defaultdict(list)
    for document, shingles in theirs.items():
        shingles -= common
        for shingle in shingles:
            index[shingle].append(document)
    found = set()
    for document, shingles in ours.items():
        rare = shingles - common
        shared = Counter(other for shingle in rare for other in index.get(shingle, ()))
        if document not in theirs and any(
            count >= max(AT_LEAST, OVERLAP * min(len(rare), len(theirs[other]))) for other, count in shared.items()
        ):
            found.add(document)
    return found


def _shingles(examples: Iterable[Example]) -> dict[str, set[int]]:
    """Hashes of all runs of SHINGLE words, by document; a shorter document is one shingle."""
    texts: dict[str, set[str]] = defaultdict(set)
    for example in examples:
        texts[example.document].add(example.source)
    found: dict[str, set[int]] = defaultdict(set)
    for document, parts in texts.items():
        for part in parts:
            words = words_of(part)
            runs = range(max(len(words) - SHINGLE + 1, 1))
            found[document] |= {hash(tuple(words[start : start + SHINGLE])) for start in runs}
    return found
