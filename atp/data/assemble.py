"""The one place where examples become train, calibration and test: by document, without near-duplicates."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from atp.data.custom import read_examples
from atp.data.duplicates import near_duplicates
from atp.data.examples import Example, chosen, joined, settled, values
from atp.data.packages import openwebtext_passages
from atp.data.settings import DataSettings
from atp.data.splits import Splits, document_id, shuffled, split_off, take
from atp.data.tasks import Task
from atp.ground.errors import InputError, quote

Passages = Callable[[int], list[str]]
"""Returns general text; the argument is the number of passages that will be drawn from it."""


@dataclass
class Parts:
    """Examples of the splits during assembly; validation only where the user gives it."""

    train: Sequence[Example] = field(default_factory=list)
    calibration: Sequence[Example] = field(default_factory=list)
    test: Sequence[Example] = field(default_factory=list)
    validation: Sequence[Example] = field(default_factory=list)

    def add(self, other: Parts) -> None:
        """Appends the examples of another data set."""
        self.train = joined(self.train, other.train)
        self.calibration = joined(self.calibration, other.calibration)
        self.test = joined(self.test, other.test)


def by_share(examples: Sequence[Example], settings: DataSettings, name: str = "") -> Parts:
    """Splits off documents by `test_share` and `calibration_share`; name makes the draws of data sets independent."""
    total = len({e.document for e in examples})
    prefix = f"{settings.seed} {name}".strip()
    rest, test = split_off(examples, settings.test_share, f"{prefix} test", of=total)
    train, calibration = split_off(rest, settings.calibration_share, f"{prefix} calibration", of=total)
    return Parts(train, calibration, test)


def by_count(examples: Sequence[Example], train: int, calibration: int, test: int, key: str) -> Parts:
    """Draws whole documents until each split has its count of examples, test first.

    With fewer examples than requested, every split gets its proportion of them.
    """
    scale = min(1.0, len(examples) / max(train + calibration + test, 1))
    documents: dict[str, list[Example]] = {}
    for example in examples:
        documents.setdefault(example.document, []).append(example)
    order = iter(shuffled(documents, key))
    drawn: list[list[Example]] = []
    for count in (test, calibration, train):
        part: list[Example] = []
        while len(part) < scaled(count, scale) and (document := next(order, None)) is not None:
            part += documents[document]
        drawn.append(part)
    return Parts(test=drawn[0], calibration=drawn[1], train=drawn[2])


def scaled(count: int, scale: float) -> int:
    """A count times a scale, at least 1 unless the count is 0."""
    return max(1, round(scale * count)) if count else 0


def assemble(
    parts: Parts,
    settings: DataSettings,
    tasks: Iterable[Task],
    source: str,
    *,
    passages: Passages = lambda count: [],
    general_share: float = 1 / 3,
    mix: bool = True,
    thin: Callable[[Sequence[Example]], Sequence[Example]] = lambda train: train,
) -> Splits:
    """Adds general text to the calibration examples and drops near-duplicates of held-out documents.

    Near-duplicates of test documents leave all others, those of calibration documents leave train and validation, and
    those of validation documents leave train. mix:
    shuffle documents, for recipes of several data sets. thin: leaves out training examples at the end. source:
    describes the data. Raises `InputError` when a split ends up empty.
    """
    share = general_share if settings.general_share is None else settings.general_share
    everything = joined(parts.train, parts.calibration, parts.test, parts.validation)
    calibration, dropped = _apart(parts.calibration, parts.test, everything)
    calibration, general = _add_general(settings, calibration, parts, share, passages)
    train, dropped_train = _apart(parts.train, joined(parts.test, calibration), everything)
    removed = dropped + dropped_train
    if removed and not (train and calibration):
        sample = (parts.train or parts.calibration)[0].text[:60]
        raise InputError(
            f"all documents left for training or calibration are near-duplicates of held-out ones, such as "
            f"{quote(sample)}: add text"
        )
    validation, dropped = _apart(parts.validation, joined(parts.test, calibration), everything)
    removed += dropped
    if parts.validation and not validation:
        raise InputError("all documents of data.validation are near-duplicates of held-out ones: give other text")
    if settings.validation_share and not validation:
        train, validation = split_off(train, settings.validation_share, f"{settings.seed} validation")
    if validation:
        train, dropped_train = _apart(train, validation, everything)
        removed += dropped_train
    whole = len(train)
    train, test = thin(train), parts.test
    remarks = f"; weights leave out {whole - len(train)} training examples" if len(train) < whole else ""
    remarks += f"; {removed} near-duplicates of held-out documents dropped" if removed else ""
    if mix:
        train, test = (take(part, set(values(part, "document")), f"{settings.seed} mix") for part in (train, test))
    return Splits(
        train=settled(train),
        calibration=settled(calibration),
        test=settled(test),
        description=(
            f"{source}: {len(train)} train, {len(calibration)} calibration ({general} of them general text), "
            + (f"{len(validation)} validation, " if validation else "")
            + f"{len(test)} test{remarks}"
        ),
        tasks=tuple(tasks),
        validation=settled(validation),
        near_duplicates=removed,
    )


def _apart(
    examples: Sequence[Example], held_out: Sequence[Example], background: Sequence[Example]
) -> tuple[Sequence[Example], int]:
    """The examples without near-duplicates of held-out ones, and the number of documents dropped."""
    near = near_duplicates(examples, held_out, background)
    ids = values(examples, "document")
    return chosen(examples, [place for place, document in enumerate(ids) if document not in near]), len(near)


def _add_general(
    settings: DataSettings, domain: Sequence[Example], parts: Parts, share: float, passages: Passages
) -> tuple[Sequence[Example], int]:
    """Mixes general text into calibration examples up to its share; returns the mix and how many were added."""
    count = round(len(domain) * share / (1 - share))
    if count == 0:
        return domain, 0
    if settings.general is None:
        texts = passages(count)
    elif settings.general.endswith(".whl"):
        texts = openwebtext_passages(Path(settings.general))
    else:
        texts = [example.text for example in read_examples(settings.general, limit=settings.limit)]
    known = {document for part in (domain, parts.train, parts.test) for document in values(part, "document")}
    by_document = {document: text for text in texts if (document := document_id(text)) not in known}
    order = shuffled(by_document, f"{settings.seed} general")[:count]
    drawn, _ = _apart([Example(document, by_document[document]) for document in order], parts.test, parts.train)
    mixed = joined(domain, drawn)
    return take(mixed, set(values(mixed, "document")), f"{settings.seed} mix"), len(drawn)
