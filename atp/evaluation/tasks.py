"""Question answering by likelihood: the answer is the label that the model finds most probable after the prompt."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from atp.data.encoding import common_prefix, encode, start_ids
from atp.data.splits import Example
from atp.evaluation.bootstrap import score_with_interval
from atp.evaluation.inference import CausalLM, Progress, inference
from atp.evaluation.metrics import confusion_items, confusion_table, macro_f1, ratio, right_items
from atp.ground.errors import InputError, NotReached, quote


@dataclass(frozen=True)
class Question:
    """A tokenized prompt and, for every label, the tokens that continue it."""

    prompt: list[int]
    continuations: list[list[int]]


@dataclass(frozen=True)
class Query:
    """One sequence to run, and which log-probabilities to collect from it.

    wanted: (position, token, question, label): the log-probability of `token` after `position` is added to the score
    of `label` for `question`.
    """

    ids: list[int]
    wanted: list[tuple[int, int, int, int]]


def label_scores(
    model: CausalLM,
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[Example],
    labels: Sequence[str],
    batch_size: int = 8,
    *,
    max_length: int = 1024,
    seed: int = 0,
    autocast: torch.dtype | None = None,
    progress: Progress | None = None,
) -> dict[str, object]:
    """Scores labelled examples by the most probable label.

    A label is scored by the summed log-probability of its tokens after the prompt. max_length: tokens of prompt and
    label; longer prompts are cut on the left, so the question stays.
    Returns the result of `answer_scores`. Raises `InputError` as `check_labels` and `tokenize_questions` do.
    """
    check_labels(examples, labels)
    questions = tokenize_questions(tokenizer, examples, labels, max_length)
    scores = score_labels(model, questions, batch_size, autocast=autocast, progress=progress)
    predicted = [labels[index] for index in scores.argmax(dim=1).tolist()]
    return answer_scores([str(e.label) for e in examples], predicted, labels, seed)


def check_labels(examples: Sequence[Example], labels: Sequence[str]) -> None:
    """Raises `InputError` if there is no example, or one whose label is not in `labels`."""
    if not examples:
        raise InputError("no labelled examples to score: give a test split with labels")
    unknown = sorted({str(e.label) for e in examples} - set(labels))
    if unknown:
        raise InputError(f"label(s) {', '.join(unknown)} are not among {', '.join(labels)}: correct data.labels")


def answer_scores(
    truth: Sequence[str], predicted: Sequence[str], labels: Sequence[str], seed: int = 0
) -> dict[str, object]:
    """Scores of answers, whoever gave them.

    Returns {accuracy, macro_f1, each with _interval (questions resampled), n, confusion (by truth, then prediction),
    items: [truth, prediction] of each question}.
    """
    confusion = confusion_items(truth, predicted, labels)
    return {
        **score_with_interval("accuracy", right_items(truth, predicted), ratio, seed),
        **score_with_interval("macro_f1", confusion, macro_f1, seed),
        "n": len(truth),
        "confusion": confusion_table(confusion, labels),
        "items": [list(pair) for pair in zip(truth, predicted, strict=True)],
    }


def tokenize_questions(
    tokenizer: PreTrainedTokenizerBase, examples: Sequence[Example], labels: Sequence[str], max_length: int
) -> list[Question]:
    """Tokenizes every prompt with every label, and splits them where they stop sharing the prompt's tokens.

    Raises `InputError` if the tokenizer cannot tell the labels apart, or max_length leaves no room for a prompt.
    """
    start = start_ids(tokenizer)
    prompts = encode(tokenizer, (e.prompt for e in examples))
    answered = encode(tokenizer, (e.prompt + _gap(e) + label for e in examples for label in labels))
    questions = []
    for index, prompt in enumerate(prompts):
        full = answered[index * len(labels) : (index + 1) * len(labels)]
        # One boundary for all labels, so that their scores are conditioned on the same tokens.
        border = common_prefix([prompt, *full])
        continuations = [ids[border:] for ids in full]
        _check_continuations(continuations, labels)
        room = max_length - len(start) - max(map(len, continuations))
        if room < 1:
            raise InputError(f"max_length {max_length} leaves no room for the prompt: raise it")
        questions.append(Question(start + prompt[:border][-room:], continuations))
    return questions


def query_lengths(questions: Sequence[Question]) -> list[int]:
    """Tokens of each sequence that `score_labels` runs."""
    return [len(query.ids) for index, question in enumerate(questions) for query in _queries(index, question)]


def score_labels(
    model: CausalLM,
    questions: Sequence[Question],
    batch_size: int,
    *,
    autocast: torch.dtype | None = None,
    progress: Progress | None = None,
) -> Tensor:
    """Log-probability of every label of every question, float64 [questions, labels].

    Raises `NotReached` if one is not finite, since then no label is the most probable one.
    """
    queries = [query for index, question in enumerate(questions) for query in _queries(index, question)]
    # Longest first: batches hold similar lengths, and one too big for memory fails at once.
    queries.sort(key=lambda query: -len(query.ids))
    scores = torch.zeros(len(questions), len(questions[0].continuations), dtype=torch.float64)
    with inference(model, autocast) as device:
        for start in range(0, len(queries), batch_size):
            batch = queries[start : start + batch_size]
            for question, label, log_prob in _run(model, batch, device):
                scores[question, label] += log_prob
            if progress is not None:
                progress(min(start + batch_size, len(queries)), len(queries))
    unclear = (~scores.isfinite()).any(dim=1)
    if unclear.any():
        raise NotReached(
            f"the model's probabilities for the answers to question {int(unclear.nonzero()[0]) + 1} are not finite, so "
            "it cannot be scored: score it in float32, or check its weights"
        )
    return scores


def _check_continuations(continuations: Sequence[Sequence[int]], labels: Sequence[str]) -> None:
    """Raises `InputError` for a label without a token of its own, since no probability could be asked for it."""
    remedy = "change data.labels, or use a model whose tokenizer has tokens for them"
    for label, tokens in zip(labels, continuations, strict=True):
        if not tokens:
            raise InputError(f"label {quote(label)} becomes no token after a prompt: {remedy}")
    for (first, ours), (second, theirs) in combinations(zip(labels, continuations, strict=True), 2):
        if ours == theirs:
            raise InputError(f"labels {quote(first)} and {quote(second)} become the same tokens: {remedy}")


def _gap(example: Example) -> str:
    """Whitespace between prompt and answer, as in the example's own completion."""
    completion = example.completion
    return completion[: len(completion) - len(completion.lstrip())] if completion else " "


def _queries(index: int, question: Question) -> list[Query]:
    """One query for all labels if each is a single token, else one per label."""
    last = len(question.prompt) - 1
    if all(len(continuation) == 1 for continuation in question.continuations):
        wanted = [(last, tokens[0], index, label) for label, tokens in enumerate(question.continuations)]
        return [Query(question.prompt, wanted)]
    return [
        Query(
            question.prompt + tokens[:-1],
            [(last + offset, token, index, label) for offset, token in enumerate(tokens)],
        )
        for label, tokens in enumerate(question.continuations)
    ]


def _run(model: CausalLM, batch: list[Query], device: torch.device) -> list[tuple[int, int, float]]:
    """Runs one batch and returns (question, label, log-probability) of all wanted tokens."""
    # Padding on the right needs no attention mask: in a causal model no wanted position sees it.
    input_ids = torch.zeros(len(batch), max(len(query.ids) for query in batch), dtype=torch.long)
    for row, query in enumerate(batch):
        input_ids[row, : len(query.ids)] = torch.tensor(query.ids)
    positions = sorted({position for query in batch for position, *_ in query.wanted})
    column = {position: index for index, position in enumerate(positions)}
    kept = torch.tensor(positions, device=device)
    logits = model(input_ids=input_ids.to(device), use_cache=False, logits_to_keep=kept).logits
    found = []
    for row, query in enumerate(batch):
        wanted_columns = [column[position] for position, *_ in query.wanted]
        tokens = [token for _, token, _, _ in query.wanted]
        log_probs = logits[row, wanted_columns].float().log_softmax(dim=-1)
        values = log_probs[range(len(tokens)), tokens].tolist()
        found += [(q, label, value) for (_, _, q, label), value in zip(query.wanted, values, strict=True)]
    return found
