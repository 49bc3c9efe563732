"""Called by lm-eval's free-text tasks for each answer; lm-eval loads this file by path."""

from __future__ import annotations

from typing import Any

from atp.data.tasks import ROUGE
from atp.evaluation.generation import first_paragraph, rouge_items


def process_results(doc: dict[str, Any], results: list[str]) -> dict[str, float]:
    """ROUGE-1, -2 and -L of the first answer against the document's completion."""
    return dict(zip(ROUGE, rouge_items([doc["completion"]], [first_paragraph(results[0])])[0].tolist(), strict=True))
