"""Prompts, in our own wording. The passage comes first: a long prompt cut from the left keeps its question."""

from __future__ import annotations

import re

_CONTEXT_MARK = re.compile(r"\s*\bContext \(\d+\):\s*")


def join_contexts(passage: str) -> str:
    """A PubMedQA abstract as one paragraph, without the `Context (n):` marks of its source."""
    return " ".join(part.strip() for part in _CONTEXT_MARK.split(passage) if part.strip())


def passage_question(passage: str, question: str) -> str:
    """Prompt of a question about an abstract; the completion is a space and the answer."""
    return f"Abstract: {passage}\nQuestion: {question.strip()}\nAnswer:"
