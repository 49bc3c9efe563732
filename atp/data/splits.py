"""Splits that never share a document."""

from __future__ import annotations

import hashlib
import re
import unicodedata
from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field
from itertools import combinations

from atp.data.examples import Example, chosen, joined, values
from atp.data.tasks import Task
from atp.ground.errors import InputError, quote

SPLITS = ("train", "calibration", "test")
_SHOWN = 10  # skipped rows that are shown


@dataclass(frozen=True)
class Splits:
    """The disjoint parts of a data set: three, and a fourth where training is watched on a validation split.

    description: one sentence for the report. tasks: how answers in the examples are scored, if any. skipped: a sentence
    on each row that could not be used. near_duplicates: documents that were left out for being like held-out ones.
    Raises `InputError` when a part is empty or when two parts share a document.
    """

    train: Sequence[Example]
    calibration: Sequence[Example]
    test: Sequence[Example]
    description: str
    tasks: tuple[Task, ...] = ()
    validation: Sequence[Example] = field(default_factory=list)
    skipped: tuple[str, ...] = ()
    near_duplicates: int = 0

    def __post_init__(self) -> None:
        for name in SPLITS:
            if not getattr(self, name):
                raise InputError(f"the {name} split is empty: {self._counted()}; add documents or change data.{name}")
        for first, second in combinations(self.parts, 2):
            _check_disjoint(first, getattr(self, first), second, getattr(self, second))

    @property
    def parts(self) -> tuple[str, ...]:
        """Names of the parts that there are."""
        return (*SPLITS, "validation") if self.validation else SPLITS

    def _counted(self) -> str:
        """The number of documents, or of examples that repeat one, for the message of an empty split."""
        examples = joined(*(getattr(self, name) for name in SPLITS))
        ids = values(examples, "document")
        documents = Counter(ids)
        copies = len(ids) - len(documents)
        if copies:
            document, times = documents.most_common(1)[0]
            sample = quote(examples[ids.index(document)].source[:60])
            return (
                f"{copies} of {len(examples)} examples repeat another's document (most often {sample}, {times} times), "
                "and these stay together"
            )
        return f"the data hold only {len(examples)} document(s)"

    @property
    def remarks(self) -> list[str]:
        """The description, and the first rows that could not be used."""
        more = [f"and {len(self.skipped) - _SHOWN} more"] if len(self.skipped) > _SHOWN else []
        return [self.description, *(f"skipped: {sentence}" for sentence in self.skipped[:_SHOWN]), *more]

    @property
    def fingerprints(self) -> dict[str, str]:
        """SHA-256 over the examples of each split in order: equal only for the same data in the same order."""
        return {name: _fingerprint(getattr(self, name)) for name in self.parts}


def words_of(text: str) -> list[str]:
    """The words of a text, ignoring case, spacing, punctuation and Unicode form."""
    return re.sub(r"\W+", " ", unicodedata.normalize("NFKC", text).lower()).split()


def document_id(text: str) -> str:
    """Id of a document: a hash of its words."""
    return hashlib.sha256(" ".join(words_of(text)).encode()).hexdigest()[:16]


def shuffled(documents: Iterable[str], key: str) -> list[str]:
    """The distinct documents in an order that depends only on the key and their ids, not on the input order.

    Orders under different keys are independent; a draw from what another draw left must use its own key.
    """
    return sorted(set(documents), key=lambda document: hashlib.sha256(f"{key}:{document}".encode()).digest())


def take(examples: Sequence[Example], documents: Collection[str], key: str) -> Sequence[Example]:
    """The examples of these documents, by document in the order of `key` (those of one document keep their order)."""
    rank = {document: position for position, document in enumerate(shuffled(documents, key))}
    ids = values(examples, "document")
    return chosen(examples, sorted((i for i, d in enumerate(ids) if d in rank), key=lambda place: rank[ids[place]]))


def split_off(
    examples: Sequence[Example], share: float, key: str, *, of: int | None = None
) -> tuple[Sequence[Example], Sequence[Example]]:
    """Splits off whole documents: returns (the rest, a share of the documents), both in the order of `key`.

    The share is of `of` documents (default: those of `examples`) and takes at least one.
    """
    documents = shuffled(values(examples, "document"), key)
    count = max(1, round(share * (of or len(documents))))
    return take(examples, documents[count:], key), take(examples, documents[:count], key)


def half(examples: Sequence[Example], name: str) -> Sequence[Example]:
    """The examples of the open or of the sealed half of all documents, in their order.

    A document's words alone decide which half it is in, so no seed moves it into the other one.
    """
    ids, wanted = values(examples, "document"), int(name == "sealed")
    drawn = {document: hashlib.sha256(f"sealed:{document}".encode()).digest()[0] % 2 for document in set(ids)}
    return chosen(examples, [place for place, document in enumerate(ids) if drawn[document] == wanted])


def _check_disjoint(first: str, one: Sequence[Example], second: str, two: Sequence[Example]) -> None:
    ids = values(two, "document")
    shared = set(values(one, "document")).intersection(ids)
    if shared:
        sample = two[next(place for place, document in enumerate(ids) if document in shared)].text[:60]
        raise InputError(
            f"{len(shared)} document(s) are in both the {first} and the {second} data (for example {quote(sample)}): "
            f"remove them from one, or give a single file to be split by document"
        )


def _fingerprint(examples: Sequence[Example]) -> str:
    digest = hashlib.sha256()
    for example in examples:
        for part in (example.document, example.prompt, example.completion, example.label or ""):
            # The length prefix keeps ("ab", "c") and ("a", "bc") apart.
            digest.update(f"{len(part)}:{part}".encode())
    return digest.hexdigest()
