"""A few held-out prompts with what models answer to them, to be read side by side."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from itertools import zip_longest
from typing import NamedTuple

import torch
from transformers import PreTrainedTokenizerBase

from atp.data.encoding import encode
from atp.data.splits import Example
from atp.evaluation.generation import generate_answers
from atp.evaluation.inference import CausalLM

MOST_TOKENS = 64
"""New tokens of one answer; short references ask for fewer."""
_LEAST_TOKENS = 8
_TEXT = 600  # characters of a plain text, of which the first half is the prompt
_LENGTH = 512  # tokens of prompt and answer: a longer prompt loses its beginning


class Sample(NamedTuple):
    """A held-out prompt, and the text that follows it in the data."""

    prompt: str
    reference: str


def held_out_samples(test: Sequence[Example], count: int) -> list[Sample]:
    """The first `count` prompts of the test split, one of each task in turn; fewer where there are fewer.

    A plain text, which has no completion, is divided into two: it is continued.
    """
    by_task: dict[str, dict[str, Sample]] = {}
    for example in test:
        sample = Sample(example.prompt, example.completion) if example.completion else _divided(example.prompt)
        known = by_task.setdefault(example.task, {})
        if len(known) < count and sample.prompt.strip() and sample.reference.strip():
            known.setdefault(sample.prompt, sample)
    rounds = zip_longest(*(samples.values() for samples in by_task.values()))
    return [sample for one_of_each in rounds for sample in one_of_each if sample is not None][:count]


def sample_answers(
    model: CausalLM,
    tokenizer: PreTrainedTokenizerBase,
    samples: Sequence[Sample],
    *,
    autocast: torch.dtype | None = None,
) -> list[str]:
    """The greedy answer to each prompt, up to an end token, a blank line or at most 64 new tokens.

    Where all references are short, twice the tokens of the longest one are the limit.
    """
    if not samples:
        return []
    longest = max(map(len, encode(tokenizer, [sample.reference for sample in samples])))
    positions = min(_LENGTH, model.config.max_position_embeddings)
    new = min(max(2 * longest, _LEAST_TOKENS), MOST_TOKENS, positions // 2)
    return generate_answers(
        model, tokenizer, [sample.prompt for sample in samples], len(samples),
        max_new_tokens=new, max_length=positions, autocast=autocast,
    )  # fmt: skip


def side_by_side(samples: Sequence[Sample], answers: Mapping[str, Sequence[str]]) -> list[dict[str, object]]:
    """[{prompt, reference, models: {model: answer}}]; answers: {model: the result of `sample_answers`}."""
    return [
        {
            "prompt": sample.prompt,
            "reference": sample.reference.strip(),
            "models": {model: given[place] for model, given in answers.items()},
        }
        for place, sample in enumerate(samples)
    ]


def _divided(text: str) -> Sample:
    """The first characters of a text, divided near their middle, between words where there are spaces."""
    text = text.strip()[:_TEXT]
    middle = len(text) // 2
    space = re.search(r"\s", text[middle:])
    middle += space.start() if space else 0
    return Sample(text[:middle], text[middle:])
