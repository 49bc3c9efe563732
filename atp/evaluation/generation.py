"""Free-text answers: greedy generation, batched, and ROUGE against the reference."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import numpy as np
import torch
from transformers import GenerationConfig, GenerationMixin, PreTrainedTokenizerBase

from atp.data.encoding import encode, start_ids
from atp.data.splits import Example
from atp.data.tasks import ROUGE
from atp.evaluation.bootstrap import score_with_interval
from atp.evaluation.inference import CausalLM, Progress, inference
from atp.evaluation.metrics import ratio
from atp.ground.errors import InputError


def generate_answers(
    model: CausalLM,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    batch_size: int = 8,
    *,
    max_new_tokens: int = 128,
    max_length: int = 1024,
    autocast: torch.dtype | None = None,
    progress: Progress | None = None,
) -> list[str]:
    """The greedy continuation of each prompt, up to an end token, a blank line or `max_new_tokens`.

    max_length: tokens of prompt and answer; longer prompts are cut on the left.
    """
    start = start_ids(tokenizer)
    room = max_length - len(start) - max_new_tokens
    if room < 1:
        raise InputError(f"max_length {max_length} leaves no room for a prompt and {max_new_tokens} tokens: raise it")
    # Without BOS an empty prompt needs a token to start from.
    ids = [start + prompt[-room:] or [tokenizer.eos_token_id] for prompt in encode(tokenizer, prompts)]
    order = sorted(range(len(ids)), key=lambda index: -len(ids[index]))
    greedy = GenerationConfig(
        do_sample=False, max_new_tokens=max_new_tokens, eos_token_id=_end_ids(model, tokenizer),
        pad_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    answers = [""] * len(ids)
    with inference(model, autocast) as device:
        for first in range(0, len(order), batch_size):
            batch = order[first : first + batch_size]
            width = len(ids[batch[0]])
            # Padded on the left, so that new tokens directly follow every prompt.
            padded = [[tokenizer.eos_token_id] * (width - len(ids[i])) + ids[i] for i in batch]
            mask = [[0] * (width - len(ids[i])) + [1] * len(ids[i]) for i in batch]
            output = cast(GenerationMixin, model).generate(
                input_ids=torch.tensor(padded, device=device), attention_mask=torch.tensor(mask, device=device),
                generation_config=greedy,
            )  # fmt: skip
            texts = tokenizer.batch_decode(output[:, width:], skip_special_tokens=True)
            for index, text in zip(batch, texts, strict=True):
                answers[index] = first_paragraph(text)
            if progress is not None:
                progress(min(first + batch_size, len(order)), len(order))
    return answers


def first_paragraph(text: str) -> str:
    """Text up to the first blank line, stripped."""
    return text.strip().split("\n\n")[0].strip()


def rouge_items(references: Sequence[str], answers: Sequence[str]) -> np.ndarray:
    """F measure of ROUGE-1, -2 and -L (Lin 2004) per pair, with Porter stemming, float64 [pairs, 3] in [0, 1].

    Raises `InputError` if package rouge-score is missing.
    """
    scorer = _scorer()
    scores = [scorer.score(reference, answer) for reference, answer in zip(references, answers, strict=True)]
    return np.array([[score[name].fmeasure for name in ROUGE] for score in scores])


def check_rouge() -> None:
    """Raises `InputError` if ROUGE cannot be computed; call it before a model runs."""
    _scorer()


def rouge_scores(
    model: CausalLM,
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[Example],
    batch_size: int = 8,
    *,
    max_new_tokens: int = 128,
    max_length: int = 1024,
    seed: int = 0,
    autocast: torch.dtype | None = None,
    progress: Progress | None = None,
) -> dict[str, object]:
    """Generates an answer to each prompt and compares it with the completion.

    Returns {rouge1, rouge2, rougeL (means), each with _interval (examples resampled), n, max_new_tokens,
    items: [rouge1, rouge2, rougeL, answer] of each example}.
    """
    if not examples:
        raise InputError("no answers to generate: give a test split with completions")
    check_rouge()
    answers = generate_answers(
        model, tokenizer, [e.prompt for e in examples], batch_size,
        max_new_tokens=max_new_tokens, max_length=max_length, autocast=autocast, progress=progress,
    )  # fmt: skip
    items = rouge_items([e.completion for e in examples], answers)
    scores: dict[str, object] = {}
    for column, name in enumerate(ROUGE):
        scores |= score_with_interval(name, np.stack([items[:, column], np.ones(len(items))], axis=1), ratio, seed)
    pairs = [[*row, answer] for row, answer in zip(items.tolist(), answers, strict=True)]
    return scores | {"n": len(examples), "max_new_tokens": max_new_tokens, "items": pairs}


def _end_ids(model: CausalLM, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Tokens that end an answer: the tokenizer's EOS, and those of the model's own generation settings."""
    own = model.generation_config.eos_token_id
    return sorted({tokenizer.eos_token_id, *(own if isinstance(own, list) else [] if own is None else [own])})


def _scorer():  # noqa: ANN202 - the type lives in the optional package
    try:
        from rouge_score.rouge_scorer import RougeScorer
    except ImportError as error:
        raise InputError("ROUGE needs package rouge-score: run pip install rouge-score, or leave it out") from error
    return RougeScorer(ROUGE, use_stemmer=True)
