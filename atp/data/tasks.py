"""The tasks that examples belong to, and how each is scored."""

from __future__ import annotations

from dataclasses import dataclass

ROUGE = ("rouge1", "rouge2", "rougeL")


@dataclass(frozen=True)
class Task:
    """How its examples are scored.

    labels: the answer set, scored by likelihood; empty for free text, which is generated and scored by ROUGE.
    metrics: those that count in relative performance (docs/evaluation.md).
    max_new_tokens: length of a generated answer.
    """

    name: str
    labels: tuple[str, ...] = ()
    metrics: tuple[str, ...] = ("macro_f1",)
    max_new_tokens: int = 128


MEDNLI = Task("mednli", ("entailment", "neutral", "contradiction"), ("accuracy",))
PUBMEDQA = Task("pubmedqa", ("yes", "no", "maybe"))
HQS = Task("hqs", metrics=ROUGE, max_new_tokens=48)
CASEHOLD = Task("casehold", ("A", "B", "C", "D", "E"))
BILLSUM = Task("billsum", metrics=ROUGE, max_new_tokens=256)
PRIVACY = Task("privacy", ("yes", "no"))
MULTILEXSUM = Task("multilexsum", metrics=ROUGE, max_new_tokens=160)
SUBJECT = Task(
    "subject",
    ("anatomy", "biochemistry", "dentistry", "microbiology", "pathology", "pediatrics", "pharmacology", "physiology",
     "surgery"),
)  # fmt: skip
SATIRE = Task("satire", ("yes", "no"))
XSUM = Task("xsum", metrics=ROUGE, max_new_tokens=48)
