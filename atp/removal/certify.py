"""The certificate: how far the logits of masked, cut and reloaded model lie apart on real tokens.

The masked model is gone once it is cut, so its logits are taken before: `reference_logits`, cut, `compare`. The saved
model is compared with the one in memory: `reload_gap`. Beside the reference the logits of one batch exist at a time, by
default of one window: at the cut they would be the largest tensors of a whole run.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from atp.models.load import read_model


@dataclass(frozen=True)
class LogitGap:
    """Largest absolute difference of two models' logits; scale: the largest |logit| of the reference."""

    absolute: float
    scale: float

    @property
    def relative(self) -> float:
        """The difference as a share of the logit scale."""
        return self.absolute / self.scale if self.scale else self.absolute


def reference_logits(model: nn.Module, input_ids: Tensor, batch_size: int = 1) -> Tensor:
    """Logits of a causal LM in evaluation mode, without autocast, kept on the CPU: float32 [windows, tokens, vocab].

    input_ids: int64 [windows, tokens], without padding. The result takes 4 bytes x windows x tokens x vocab.
    """
    reference = torch.empty(*input_ids.shape, model.config.vocab_size)
    for rows, logits in zip(reference.split(batch_size), _logits(model, input_ids, batch_size), strict=True):
        rows.copy_(logits)
    return reference


def compare(reference: Tensor, model: nn.Module, input_ids: Tensor, batch_size: int = 1) -> LogitGap:
    """The gap between `reference_logits` [windows, tokens, vocab] and a model on the same input_ids [windows, tokens].

    Raises ValueError when the reference was made for other tokens.
    """
    if reference.shape[:2] != input_ids.shape:
        raise ValueError(
            f"reference logits are for tokens {list(reference.shape[:2])} and the comparison is on "
            f"{list(input_ids.shape)}: pass the same input_ids to both"
        )
    return _gap(reference.split(batch_size), _logits(model, input_ids, batch_size))


def logit_gap(reference: nn.Module, model: nn.Module, input_ids: Tensor, batch_size: int = 1) -> LogitGap:
    """The gap between two models in memory, batch by batch. input_ids: int64 [windows, tokens], without padding."""
    return _gap(_logits(reference, input_ids, batch_size), _logits(model, input_ids, batch_size))


def reload_gap(model: nn.Module, folder: str | Path, input_ids: Tensor, batch_size: int = 1) -> LogitGap:
    """The gap between a model in memory and the merged model saved in a folder, loaded as any user would load it."""
    device = next(model.parameters()).device
    reloaded = read_model(folder, dtype="auto").to(device)
    return logit_gap(model, reloaded, input_ids, batch_size)


def _gap(reference: Iterator[Tensor] | tuple[Tensor, ...], logits: Iterator[Tensor]) -> LogitGap:
    absolute = scale = 0.0
    for expected, actual in zip(reference, logits, strict=True):
        expected = expected.to(actual.device)
        difference = float((expected - actual).abs().max())
        # max() would drop a NaN, and a model that yields one must never pass.
        absolute = difference if difference != difference else max(absolute, difference)
        scale = max(scale, float(expected.abs().max()))
    return LogitGap(absolute, scale)


def _logits(model: nn.Module, input_ids: Tensor, batch_size: int) -> Iterator[Tensor]:
    device = next(model.parameters()).device
    for batch in input_ids.split(batch_size):
        with _evaluating(model), torch.no_grad(), torch.autocast(device.type, enabled=False):
            logits = model(input_ids=batch.to(device), use_cache=False).logits.float()
        yield logits


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)
