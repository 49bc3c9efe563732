"""Perplexity by document: of whole documents under a sliding window, or of packed training windows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedTokenizerBase

from atp.data.encoding import byte_lengths, encode, start_ids
from atp.data.packing import IGNORE, PackedDataset
from atp.data.splits import Example
from atp.data.tokens import Pieces
from atp.evaluation.bootstrap import score_with_interval
from atp.evaluation.inference import CausalLM, Progress, inference
from atp.evaluation.metrics import bits_per_byte_of, perplexity_of
from atp.ground.errors import InputError, NotReached
from atp.processes.finite import is_finite

ALL, ANSWERS = "all tokens", "answers"
"""Which tokens a perplexity counts: all, or those of completions and of text without a prompt."""


@dataclass(frozen=True)
class ScoredWindows:
    """Windows to run, and the document that each of their tokens counts towards.

    input_ids, labels, documents: int64 [windows, length]; a label is the token at the same position, or -100 if it is
    not scored (the model shifts). documents: index of the document of each position. protocol: how the windows were
    made, for the record. bytes: of text, that each label stands for, int64 like labels; None where that is not known.
    """

    input_ids: Tensor
    labels: Tensor
    documents: Tensor
    protocol: dict[str, object]
    bytes: Tensor | None = None


def sliding_windows(
    examples: Sequence[Example], tokenizer: PreTrainedTokenizerBase, length: int, stride: int | None = None
) -> ScoredWindows:
    """Windows over each example alone: every token is scored once, with up to length - 1 tokens of context.

    Windows start `stride` tokens apart (default: half a window); each scores the tokens that the one before did not.
    Examples start with BOS if the tokenizer adds it; otherwise their first token is context only. EOS is not scored.
    Examples of one document count as one document.
    """
    stride = length // 2 if stride is None else stride
    if not 1 <= stride < length:
        raise InputError(f"stride {stride} does not fit windows of {length} tokens: choose one from 1 to length - 1")
    start = start_ids(tokenizer)
    place = {document: index for index, document in enumerate(dict.fromkeys(e.document for e in examples))}
    ids, labels, documents = [], [], []
    for example, text_ids in zip(examples, encode(tokenizer, (e.text for e in examples)), strict=True):
        tokens = start + text_ids
        scored = 0
        # The last window must add tokens to the one before it.
        for begin in range(0, max(len(tokens) - length + stride, 1), stride):
            window = tokens[begin : begin + length]
            padding = [0] * (length - len(window))
            seen = scored - begin if begin else len(start)
            ids.append(window + padding)
            labels.append([IGNORE] * seen + window[seen:] + [IGNORE] * len(padding))
            documents.append([place[example.document]] * length)
            scored = begin + len(window)
    protocol: dict[str, object] = {"counted": ALL, "bos": bool(start), "length": length, "stride": stride}
    scored_ids = torch.tensor(labels)
    lengths = byte_lengths(tokenizer, scored_ids)
    return ScoredWindows(torch.tensor(ids), scored_ids, torch.tensor(documents), protocol, lengths)


def packed_windows(
    dataset: PackedDataset | Pieces, tokenizer: PreTrainedTokenizerBase, most: int | None = None
) -> ScoredWindows:
    """Windows as training packs them, without overlap: a document ends with EOS, which is scored too.

    most: only so many of them, the first, where they are read from a table.
    """
    if isinstance(dataset, Pieces):
        rows = list(islice(dataset, most))
        ids, labels = (torch.stack([row[name] for row in rows]) for name in ("input_ids", "labels"))
        dataset = PackedDataset(ids, labels)
    ends = (dataset.input_ids == tokenizer.eos_token_id).long().flatten()
    documents = (ends.cumsum(0) - ends).view_as(dataset.input_ids)
    length = dataset.input_ids.shape[1]
    # The padding of an only window has no loss either, and is EOS.
    prompts = bool(((dataset.labels == IGNORE) & (dataset.input_ids != tokenizer.eos_token_id)).any())
    protocol: dict[str, object] = {
        "counted": ANSWERS if prompts else ALL, "bos": bool(start_ids(tokenizer)), "length": length, "stride": length,
    }  # fmt: skip
    lengths = byte_lengths(tokenizer, dataset.labels)
    return ScoredWindows(dataset.input_ids, dataset.labels, documents, protocol, lengths)


def bytes_of(windows: ScoredWindows, count: int) -> int | None:
    """Bytes of text that the labels of the first `count` windows stand for; None where that is not known."""
    return None if windows.bytes is None else int(windows.bytes[:count, 1:].sum())


def windows_of(windows: ScoredWindows, size: int | None, count: int) -> int:
    """How many windows, from the first, hold `size` bytes of text, so that another tokenizer scores the same text.

    All of them if they hold fewer; `count` where bytes are not known.
    """
    if windows.bytes is None or size is None:
        return count
    held = windows.bytes[:, 1:].sum(1).cumsum(0)
    return min(int((held < size).sum()) + 1, len(held))


def perplexity(
    model: CausalLM,
    windows: ScoredWindows,
    batch_size: int = 8,
    *,
    max_windows: int | None = None,
    seed: int = 0,
    autocast: torch.dtype | None = None,
    progress: Progress | None = None,
) -> dict[str, object]:
    """exp of the mean negative log-likelihood over all scored tokens of all documents.

    max_windows: score only the first windows. autocast: dtype to run the model in; the loss is always float32.
    Raises `NotReached` for a document whose loss is not finite.
    Returns {perplexity, perplexity_interval (documents resampled), nll (nats), tokens, documents, the protocol,
    items: [nll, tokens] of each document}. Where bytes are known, also bits_per_byte and its interval, and items have
    bytes as a third column.
    """
    count = len(windows.input_ids) if max_windows is None else min(max_windows, len(windows.input_ids))
    columns = 2 if windows.bytes is None else 3
    items = torch.zeros(int(windows.documents.max()) + 1, columns, dtype=torch.float64)
    with inference(model, autocast) as device:
        for start in range(0, count, batch_size):
            batch = slice(start, min(start + batch_size, count))
            _add_losses(items, model, windows, batch, device)
            if progress is not None:
                progress(batch.stop, count)
    if not is_finite(items):
        document = int((~items.isfinite()).any(dim=1).nonzero()[0])
        raise NotReached(
            f"the model's loss on document {document + 1} of the test text is not finite, so it cannot be scored: "
            "score it in float32, or check its weights"
        )
    items = items[items[:, 1] > 0]
    nll, tokens, *size = items.sum(0).tolist()
    if size == [0.0]:  # nothing but special tokens
        items = items[:, :2]
    compared = score_with_interval("bits_per_byte", items.numpy(), bits_per_byte_of, seed) if any(size) else {}
    return {
        **score_with_interval("perplexity", items.numpy(), perplexity_of, seed),
        **compared,
        "nll": nll / tokens,
        "tokens": int(tokens),
        "documents": len(items),
        **windows.protocol,
        "items": items.tolist(),
    }


def _add_losses(items: Tensor, model: CausalLM, windows: ScoredWindows, batch: slice, device: torch.device) -> None:
    """Adds [loss, 1, bytes if known] of each scored token of a batch to its document; no logits outlive the call."""
    logits = model(input_ids=windows.input_ids[batch].to(device), use_cache=False).logits
    targets, documents = windows.labels[batch, 1:], windows.documents[batch, 1:]
    sizes = torch.ones(len(targets), 0) if windows.bytes is None else windows.bytes[batch, 1:]
    # Row by row, so that only one window's logits exist in float32.
    for row, target, document, size in zip(logits[:, :-1], targets, documents, sizes, strict=True):
        kept = target != IGNORE
        nll = F.cross_entropy(row.float(), target.to(device), ignore_index=IGNORE, reduction="none")
        counts = [torch.ones_like(size), size] if len(size) else [torch.ones_like(target)]
        figures = torch.stack([nll.cpu().double(), *(count.double() for count in counts)], 1)
        items.index_add_(0, document[kept], figures[kept])
