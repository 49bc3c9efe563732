"""The paper's domains from the Hub or local files, with the paper's counts (docs/data.md)."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from atp.data.assemble import Parts, assemble, by_count, scaled
from atp.data.custom import check_label
from atp.data.files import read_rows
from atp.data.formats import SUFFIXES
from atp.data.hub import HubName
from atp.data.prompts import clip, entailment, health_question, holding_choice, passage_question, summary_of
from atp.data.rows import Row
from atp.data.settings import DataSettings
from atp.data.splits import Example, Splits, document_id
from atp.data.tasks import BILLSUM, CASEHOLD, HQS, MEDNLI, PUBMEDQA, Task
from atp.ground.errors import InputError, shorten
from atp.ground.reading import existing

BILL_WORDS = 700


@dataclass(frozen=True)
class DataSet:
    """One data set of a recipe: its source, the meaning of a row, and the number of examples per split.

    source, test_source: a file or Hub name; None if the user must give one. Without a test source, test examples are
    split off. optional: skipped if the user gives no source.
    """

    name: str
    read: Callable[[Row], Example]
    train: int
    calibration: int
    test: int
    source: str | None = None
    test_source: str | None = None
    optional: bool = False
    task: Task | None = None


def mednli_example(row: Row) -> Example:
    """MedNLI as on PhysioNet: columns sentence1, sentence2, gold_label."""
    premise = row.text("sentence1").strip()
    label = check_label(row, row.text("gold_label").strip(), MEDNLI.labels)
    prompt = entailment(premise, row.text("sentence2"))
    return Example(document_id(premise), prompt, f" {label}", label, MEDNLI.name, premise)


def pubmedqa_example(row: Row) -> Example:
    """PubMedQA as on the Hub: columns question, context.contexts, final_decision."""
    passage = " ".join(part.strip() for part in row.texts("context.contexts"))
    answer = check_label(row, row.text("final_decision").strip(), PUBMEDQA.labels)
    prompt = passage_question(passage, row.text("question"))
    return Example(document_id(passage), prompt, f" {answer}", answer, PUBMEDQA.name, passage)


def hqs_example(row: Row) -> Example:
    """MeQSum: a consumer's health question and its summary, columns CHQ, Summary."""
    message = row.text("CHQ").strip()
    summary = f" {row.text('Summary').strip()}"
    return Example(document_id(message), health_question(message), summary, None, HQS.name, message)


def casehold_example(row: Row) -> Example:
    """CaseHOLD as in LexGLUE: columns context, endings (five holdings), label (0 to 4)."""
    context, holdings = row.text("context").strip(), row.texts("endings", len(CASEHOLD.labels))
    index = check_label(row, str(row.get("label")), [str(number) for number in range(len(CASEHOLD.labels))])
    letter = CASEHOLD.labels[int(index)]
    prompt = holding_choice(context, holdings)
    return Example(document_id(context), prompt, f" {letter}", letter, CASEHOLD.name, context)


def billsum_example(row: Row) -> Example:
    """BillSum: columns text, summary; the first 700 words of a bill."""
    bill = clip(row.text("text"), BILL_WORDS)
    summary = f" {' '.join(row.text('summary').split())}"
    return Example(document_id(bill), summary_of("Bill", bill), summary, None, BILLSUM.name, bill)


def text_example(row: Row) -> Example:
    """Plain text: column text."""
    text = row.text("text").strip()
    if not text:
        raise InputError(f"{row.where}: no text; remove the row")
    return Example(document_id(text), text)


C4 = "allenai/c4#en:train"
HEALTH = (
    DataSet("mednli", mednli_example, 7000, 200, 1000, task=MEDNLI),
    DataSet("pubmedqa", pubmedqa_example, 7000, 600, 500, "qiaojin/PubMedQA#pqa_artificial:train",
            "qiaojin/PubMedQA#pqa_labeled:train", task=PUBMEDQA),
    DataSet("hqs", hqs_example, 1000, 100, 100, "albertvillanova/meqsum:train", task=HQS),
    DataSet("text", text_example, 0, 200, 200, optional=True),
)  # fmt: skip
LEGAL = (
    DataSet("casehold", casehold_example, 13000, 500, 1000, "coastalcph/lex_glue#case_hold:train",
            "coastalcph/lex_glue#case_hold:test", task=CASEHOLD),
    DataSet("billsum", billsum_example, 2000, 200, 200, "FiscalNote/billsum:train", "FiscalNote/billsum:test",
            task=BILLSUM),
    DataSet("text", text_example, 0, 300, 200, optional=True),
)  # fmt: skip
GENERAL = (DataSet("text", text_example, 15000, 500, 500, C4),)


def health(settings: DataSettings) -> Splits:
    """MedNLI, PubMedQA and health-question summaries, 7:7:1."""
    return _domain(HEALTH, settings, "MedNLI, PubMedQA and HQS", general_share=500 / 1600)


def legal(settings: DataSettings) -> Splits:
    """CaseHOLD and BillSum, 13:2."""
    return _domain(LEGAL, settings, "CaseHOLD and BillSum", general_share=500 / 1500)


def general(settings: DataSettings) -> Splits:
    """Web text."""
    return _domain(GENERAL, settings, "web text", general_share=0.0)


DOMAIN_RECIPES: dict[str, Callable[[DataSettings], Splits]] = {"health": health, "legal": legal, "general": general}


def hub_sources(recipe: str, given: Mapping[str, str], other: Iterable[str] = ()) -> list[str]:
    """The Hub data sets that a run reads, as the config or the recipe names them, sorted.

    given: the config's `data.sources`, which replace a recipe's own. other: further sources that the config names.
    """
    sets = {"health": HEALTH, "legal": LEGAL, "general": GENERAL}.get(recipe, ())
    own = [source for one in sets if one.name not in given for source in (one.source, one.test_source)]
    sources = [source for source in (*own, *given.values(), *other) if source and existing(source) is None]
    names = {source: HubName.parse(source).name for source in sources}
    names = {source: name for source, name in names.items() if not name.lower().endswith(SUFFIXES)}
    return sorted(source for source, name in names.items() if re.fullmatch(r"[\w.-]+/[\w.-]+", name))


def _domain(sets: tuple[DataSet, ...], settings: DataSettings, source: str, *, general_share: float) -> Splits:
    known = [name for one in sets for name in (one.name, f"{one.name}_test")]
    for name in settings.sources:
        if name not in known:
            raise InputError(f"data.sources.{shorten(name)} is unknown: this recipe has {', '.join(known)}")
    parts = Parts()
    for one in sets:
        parts.add(_load(one, settings))
    tasks = (one.task for one in sets if one.task is not None)
    return assemble(
        parts, settings, tasks, source, general_share=general_share,
        passages=lambda count: [text_example(row).text for row in read_rows(C4, limit=2 * count)],
    )  # fmt: skip


def _load(one: DataSet, settings: DataSettings) -> Parts:
    """Reads up to twice the number of examples needed, and divides them among the splits."""
    source = settings.sources.get(one.name, one.source)
    if source is None:
        if one.optional:
            return Parts()
        raise InputError(
            f"data.sources.{one.name} is not set: {one.name} may not be redistributed, so give your own copy of it"
        )
    # The Hub's test part goes only with the Hub's train part.
    default_test = one.test_source if source == one.source else None
    test_source = settings.sources.get(f"{one.name}_test", default_test)
    train, calibration, test = (scaled(count, settings.scale) for count in (one.train, one.calibration, one.test))
    key = f"{settings.seed} {one.name}"
    if test_source is None:
        return by_count(_read(one, source, train + calibration + test), train, calibration, test, key)
    held_out = by_count(_read(one, test_source, test), 0, 0, test, key)
    parts = by_count(_read(one, source, train + calibration), train, calibration, 0, key)
    return Parts(parts.train, parts.calibration, held_out.test)


def _read(one: DataSet, source: str, count: int) -> list[Example]:
    return [one.read(row) for row in read_rows(source, limit=2 * max(count, 1))]
