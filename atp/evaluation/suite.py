"""The scores of one model in one dict."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from atp.data.packing import PackedDataset
from atp.data.splits import Example
from atp.evaluation.inference import Progress
from atp.evaluation.perplexity import perplexity
from atp.evaluation.tasks import label_accuracy


def evaluate_model(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    windows: PackedDataset,
    examples: Sequence[Example] = (),
    *,
    labels: Sequence[str] = (),
    batch_size: int = 8,
    max_windows: int | None = None,
    max_examples: int | None = None,
    max_length: int = 1024,
    autocast: torch.dtype | None = None,
    progress: Progress | None = None,
) -> dict[str, object]:
    """Perplexity over packed windows, and answers to the labelled examples when `labels` is given.

    Works for any causal LM that takes `logits_to_keep`: stock, PEFT-wrapped, masked or cut.
    Returns {perplexity, nll, tokens} and, with labels, qa: {accuracy, macro_f1, n, confusion}.
    """
    scores: dict[str, object] = dict(
        perplexity(model, windows, batch_size, max_windows=max_windows, autocast=autocast, progress=progress)
    )
    if labels:
        labelled = [example for example in examples if example.label is not None]
        scores["qa"] = label_accuracy(
            model, tokenizer, labelled, labels, batch_size,
            max_length=max_length, max_examples=max_examples, autocast=autocast, progress=progress,
        )  # fmt: skip
    return scores
