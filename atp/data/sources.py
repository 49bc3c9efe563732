"""The sources of recipe `custom`: one or several, with weights, and what becomes of rows that cannot be used."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace

from atp.data.custom import Meaning, read_examples
from atp.data.rows import Bad
from atp.data.splits import Example, shuffled
from atp.errors import InputError, shorten

Sources = str | Sequence[str] | Mapping[str, float]
"""A file, folder or Hub name; several; or each with its weight."""


def read_sources(given: Sources, meaning: Meaning, limit: int | None, skipped: list[str] | None) -> list[Example]:
    """The examples of all sources in order; weighted ones know their origin. limit: rows to read of each.

    skipped: takes a sentence on each row that is left out; None: the first such row is an `InputError`. Raises
    `InputError` for a source of which no row is left.
    """
    found = []
    for source in [given] if isinstance(given, str) else given:
        before = len(skipped or ())
        examples = read_examples(source, limit=limit, meaning=meaning, bad=_taker(skipped))
        if not examples and skipped is not None:
            raise InputError(
                f"none of the {len(skipped) - before} rows of {shorten(source)} can be used; the first: "
                f"{shorten(skipped[before], 400)}"
            )
        weighted = isinstance(given, Mapping)
        found += [replace(example, origin=source) for example in examples] if weighted else examples
    return found


def weighed(train: list[Example], given: Sources, seed: int) -> list[Example]:
    """The training examples of weighted sources, as many of each as its weight says; all of them without weights.

    Nothing is repeated: the source that has the fewest examples for its weight is used whole, and of the others whole
    documents are left out, and a part of one, in an order that depends only on the seed. Raises `InputError` for a
    source without training examples.
    """
    if not isinstance(given, Mapping):
        return train
    counts = Counter(example.origin for example in train)
    for source in given:
        if not counts[source]:
            raise InputError(f"no training rows of {shorten(source)} are left: add rows, or take it out of data.train")
    most = min(counts[source] / weight for source, weight in given.items())
    left = {source: max(1, round(most * weight)) for source, weight in given.items()}
    rank = {document: place for place, document in enumerate(shuffled((e.document for e in train), f"{seed} weights"))}
    kept = set()
    for index in sorted(range(len(train)), key=lambda index: rank[train[index].document]):
        origin = train[index].origin
        if left[origin]:
            left[origin] -= 1
            kept.add(index)
    return [example for index, example in enumerate(train) if index in kept]


def described(given: Sources) -> str:
    """The sources in words."""
    if isinstance(given, str):
        return given
    names = [f"{source} (weight {given[source]:g})" if isinstance(given, Mapping) else source for source in given]
    return ", ".join(names)


def _taker(skipped: list[str] | None) -> Bad:
    def stop(error: InputError) -> None:
        raise InputError(f"{error}; or leave such rows out with data.on_error=skip") from error

    return stop if skipped is None else lambda error: skipped.append(str(error))
