"""Packing documents into windows of equal length, so that no training step pays for padding."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerBase

from atp.data.batches import IGNORE
from atp.data.encoding import common_prefix, encode, start_ids
from atp.data.splits import Example
from atp.errors import InputError


class PackedDataset(Dataset):
    """Windows of tokens, ready for the default collator.

    input_ids, labels: int64 [windows, length]; a label is the token at the same position (the model shifts), or -100
    where no loss is taken. Items are dicts of both, [length] each.
    """

    def __init__(self, input_ids: Tensor, labels: Tensor):
        self.input_ids = input_ids
        self.labels = labels

    def __len__(self) -> int:
        return len(self.input_ids)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"input_ids": self.input_ids[index], "labels": self.labels[index]}

    @property
    def tokens(self) -> int:
        """Tokens in all windows."""
        return self.input_ids.numel()


def pack(
    examples: Sequence[Example],
    tokenizer: PreTrainedTokenizerBase,
    length: int,
    *,
    loss_on: Literal["all", "completion"] = "all",
) -> PackedDataset:
    """Tokenises the examples in order, ends each with EOS, joins them and cuts windows of `length` tokens.

    loss_on "completion" takes the loss on completions (and their EOS) only; plain text, which has no completion, is
    learnt whole. The last partial window is dropped, or padded if it is the only one.
    Raises `InputError` for no examples, a tokenizer without EOS, or windows in which no token bears a loss.
    """
    if not examples:
        raise InputError("nothing to pack: the split has no examples")
    if length < 2:
        raise InputError(f"a window of {length} token(s) has nothing to predict: make data.length at least 2")
    if tokenizer.eos_token_id is None:
        raise InputError("the tokenizer has no EOS token to part documents: set tokenizer.eos_token")
    ids, labels = _stream(examples, tokenizer, loss_on)
    if len(ids) < length:
        missing = length - len(ids)
        ids += [tokenizer.eos_token_id] * missing
        labels += [IGNORE] * missing
    windows = len(ids) // length
    packed_ids = torch.tensor(ids[: windows * length]).view(windows, length)
    packed_labels = torch.tensor(labels[: windows * length]).view(windows, length)
    if (packed_labels[:, 1:] == IGNORE).all():
        raise InputError("no token bears a loss: give completions, or use loss_on 'all'")
    return PackedDataset(packed_ids, packed_labels)


def _stream(
    examples: Sequence[Example], tokenizer: PreTrainedTokenizerBase, loss_on: str
) -> tuple[list[int], list[int]]:
    """Ids and labels of all documents in a row."""
    start = start_ids(tokenizer)
    documents = encode(tokenizer, (e.text for e in examples))
    skip = [0] * len(examples)
    if loss_on == "completion":
        prompts = encode(tokenizer, (e.prompt for e in examples))
        for index, (example, prompt, document) in enumerate(zip(examples, prompts, documents, strict=True)):
            skip[index] = common_prefix([prompt, document]) if example.completion else 0
    ids: list[int] = []
    labels: list[int] = []
    for document, skipped in zip(documents, skip, strict=True):
        ended = [*document, tokenizer.eos_token_id]
        ids += start + ended
        labels += [IGNORE] * (len(start) + skipped) + ended[skipped:]
    return ids, labels
