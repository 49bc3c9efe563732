"""The trimmed vocabulary of a run: its words, in a file of the run folder, and what it was measured to change."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from atp.data.examples import Example
from atp.ground.files import write_tensors
from atp.removal.certify import reference_logits
from atp.vocabulary.choice import tokens_per_text
from atp.vocabulary.trim import trim_model, trimmed_config, trimmed_tokenizer

_TEXTS = 1000  # held-out texts whose tokens are counted before and after
_KEPT = "kept"


@dataclass(frozen=True)
class Vocabulary:
    """The words that a run keeps. kept: their old ids, int64 [words], ascending; whole: the model's own tokenizer."""

    kept: Tensor
    whole: PreTrainedTokenizerBase

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer of the kept words."""
        return trimmed_tokenizer(self.whole, self.kept)

    def shapes(self, config: PretrainedConfig) -> PretrainedConfig:
        """The config of the trimmed model; config: of the whole one."""
        return trimmed_config(config, self.kept)

    def trim(self, model: PreTrainedModel, windows: Callable[[], Tensor] | None = None) -> float | None:
        """Trims the model in place. With windows, returns the largest change of a logit of a kept word on them.

        windows: int64 [windows, tokens], by the new ids. Logits are compared in float32 arithmetic; the change is NaN
        where one is not a number. Both models do the same products, so it is 0.
        """
        if windows is None:
            trim_model(model, self.kept)
            return None
        tokens, words = windows(), model.config.vocab_size
        before = [reference_logits(model, self.kept[window])[..., self.kept] for window in tokens.split(1)]
        trim_model(model, self.kept)
        with _head_of(model, self.kept, words):
            changes = [
                float(torch.linalg.vector_norm(reference_logits(model, window)[..., self.kept] - logits, math.inf))
                for window, logits in zip(tokens.split(1), before, strict=True)
            ]
        return math.nan if any(map(math.isnan, changes)) else max(changes)

    def facts(self, config: PretrainedConfig, dtype: torch.dtype, texts: Sequence[Example]) -> dict[str, Any]:
        """Words, their parameters and megabytes, and tokens of a held-out text, each before and after.

        config: of the whole model. dtype: of its weights. texts: held-out examples.
        """
        read = [example.text for example in texts[:_TEXTS]]
        spelled = {"before": self.whole, "after": self.tokenizer}
        counts = {when: tokens_per_text(tokenizer, read) for when, tokenizer in spelled.items()}
        return sizes_of_words(config, dtype, len(self.kept)) | {"tokens_per_text": counts}

    def write(self, path: Path) -> None:
        """Writes the kept ids to a safetensors file, in one step."""
        write_tensors(path, {_KEPT: self.kept})


@contextmanager
def _head_of(model: Any, kept: Tensor, words: int) -> Iterator[None]:
    """Gives the head of a trimmed model as many rows as it had, those of the other words being zeros.

    A product with another number of rows may sum in another order, which says nothing of the rows.
    """
    head, config = model.get_output_embeddings(), model.config
    own = dict(head.named_parameters(recurse=False))
    for name, rows in own.items():
        whole = rows.new_zeros(words, *rows.shape[1:])
        whole[kept.to(rows.device)] = rows.detach()
        setattr(head, name, nn.Parameter(whole, requires_grad=False))
    config.vocab_size = words
    try:
        yield
    finally:
        config.vocab_size = len(kept)
        for name, rows in own.items():
            setattr(head, name, rows)


def sizes_of_words(config: PretrainedConfig, dtype: torch.dtype, kept: int | None) -> dict[str, Any]:
    """Words, their parameters and megabytes before and after; arguments: as in `Vocabulary.facts`, None: not known."""
    each = word_parameters(config)
    words = {"before": int(config.vocab_size), "after": kept}
    counts = {when: None if count is None else each * count for when, count in words.items()}
    sizes = {when: None if count is None else count * dtype.itemsize / 1e6 for when, count in counts.items()}
    return {"words": words, "parameters": counts, "megabytes": sizes}


def words_remark(facts: dict[str, Any]) -> str:
    """A sentence on what `Vocabulary.facts` found, for the terminal, the report and the model card."""
    words, spelled = facts["words"], facts.get("tokens_per_text")
    times = ""
    if spelled is not None and spelled["before"]:
        times = f", and a held-out text takes {spelled['after'] / spelled['before']:.3f} times the tokens"
    return (
        f"vocabulary: {words['after']:,} of {words['before']:,} words stay, in {facts['megabytes']['after']:,.1f} "
        f"instead of {facts['megabytes']['before']:,.1f} MB{times}"
    )


def written(path: Path) -> Tensor | None:
    """The kept ids in a file; None if it is missing or damaged: they are then chosen again, and compared."""
    try:
        return load_file(path)[_KEPT]
    except (OSError, KeyError, SafetensorError):
        return None


def word_parameters(config: PretrainedConfig) -> int:
    """Parameters of a word: its row of the embedding, and that of a head that is not tied to it."""
    return int(config.hidden_size) * (1 if config.tie_word_embeddings else 2)
