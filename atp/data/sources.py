"""The sources of recipe `custom`: one or several, with weights, and what becomes of rows that cannot be used."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

from atp.data.cache import read_source
from atp.data.custom import Meaning
from atp.data.examples import Example, chosen, joined, values, with_origin
from atp.data.splits import shuffled
from atp.ground.errors import InputError, shorten

Sources = str | Sequence[str] | Mapping[str, float]
"""A file, folder or Hub name; several; or each with its weight."""


def read_sources(
    given: Sources, meaning: Meaning, limit: int | None, skipped: list[str] | None, workers: int = 0
) -> Sequence[Example]:
    """The examples of all sources in order; weighted ones know their origin. limit: rows to read of each.

    skipped: takes a sentence on each row that is left out; None: the first such row is an `InputError`. Raises
    `InputError` for a source of which no row is left. workers: as in `DataSettings`.
    """
    found = []
    for source in [given] if isinstance(given, str) else given:
        left_out: list[str] | None = None if skipped is None else []
        examples = read_source(source, meaning, limit, left_out, workers)
        if left_out and not examples:
            raise InputError(
                f"none of the {len(left_out)} rows of {shorten(source)} can be used; the first: "
                f"{shorten(left_out[0], 400)}"
            )
        if skipped is not None:
            skipped += left_out or []
        found.append(with_origin(examples, source) if isinstance(given, Mapping) else examples)
    return joined(*found)


def weighed(train: Sequence[Example], given: Sources, seed: int) -> Sequence[Example]:
    """The training examples of weighted sources, as many of each as its weight says; all of them without weights.

    Nothing is repeated: the source that has the fewest examples for its weight is used whole, and of the others whole
    documents are left out, and a part of one, in an order that depends only on the seed. Raises `InputError` for a
    source without training examples.
    """
    if not isinstance(given, Mapping):
        return train
    origins, documents = values(train, "origin"), values(train, "document")
    counts = Counter(origins)
    for source in given:
        if not counts[source]:
            raise InputError(f"no training rows of {shorten(source)} are left: add rows, or take it out of data.train")
    most = min(counts[source] / weight for source, weight in given.items())
    left = {source: max(1, round(most * weight)) for source, weight in given.items()}
    rank = {document: place for place, document in enumerate(shuffled(documents, f"{seed} weights"))}
    kept = []
    for index in sorted(range(len(train)), key=lambda index: rank[documents[index]]):
        if left[origins[index]]:
            left[origins[index]] -= 1
            kept.append(index)
    return chosen(train, sorted(kept))


def described(given: Sources) -> str:
    """The sources in words."""
    if isinstance(given, str):
        return given
    names = [f"{source} (weight {given[source]:g})" if isinstance(given, Mapping) else source for source in given]
    return ", ".join(names)
