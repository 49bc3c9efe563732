"""Prompts, in our own wording. The text comes first, so that a long prompt cut from the left keeps its question."""

from __future__ import annotations

import re
from collections.abc import Sequence

_CONTEXT_MARK = re.compile(r"\s*\bContext \(\d+\):\s*")


def join_contexts(passage: str) -> str:
    """A PubMedQA abstract as one paragraph, without the `Context (n):` marks of its source."""
    return " ".join(part.strip() for part in _CONTEXT_MARK.split(passage) if part.strip())


def clip(text: str, words: int) -> str:
    """The first words of a text, so that prompt and answer fit a small model's windows."""
    parts = text.split()
    return text.strip() if len(parts) <= words else " ".join(parts[:words])


def passage_question(passage: str, question: str) -> str:
    """Prompt of a question about an abstract; the completion is a space and the answer."""
    return f"Abstract: {passage}\nQuestion: {question.strip()}\nAnswer:"


def entailment(premise: str, hypothesis: str) -> str:
    """Prompt whose completion says how a hypothesis relates to its premise."""
    return (
        f"Premise: {premise.strip()}\nHypothesis: {hypothesis.strip()}\n"
        "Relation (entailment, neutral or contradiction):"
    )


def health_question(message: str) -> str:
    """Prompt whose completion is the question that a patient's message asks."""
    return f"Message: {message.strip()}\nThe question it asks, in one sentence:"


def holding_choice(context: str, holdings: Sequence[str]) -> str:
    """Prompt whose completion is the letter of the holding missing from the citing text."""
    choices = "\n".join(f"{letter}. {holding.strip()}" for letter, holding in zip("ABCDE", holdings, strict=True))
    return f"Citing text: {context.strip()}\nHoldings:\n{choices}\nThe holding left out of the citing text is"


def clause_question(clause: str, question: str) -> str:
    """Prompt whose completion says whether a clause of a privacy policy bears on a question."""
    return f"Clause: {clause.strip()}\nQuestion: {question.strip()}\nDoes the clause help to answer the question?"


def summary_of(kind: str, text: str) -> str:
    """Prompt whose completion is a summary; kind says what the text is: Bill, Case, Article."""
    return f"{kind}: {text}\nSummary:"


def exam_subject(question: str) -> str:
    """Prompt whose completion is the subject that an exam question belongs to."""
    return f"Exam question: {question}\nSubject:"


def headline_satire(headline: str) -> str:
    """Prompt whose completion says whether a headline is satire."""
    return f"Headline: {headline}\nIs it satire?"


def question_answer(question: str) -> str:
    """Prompt of a question without a passage."""
    return f"Question: {question.strip()}\nAnswer:"
