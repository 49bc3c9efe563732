"""Weights that are trained in float32 and stored narrower: embeddings beside LoRA, or all of the model after the cut.

A step of AdamW is often smaller than the distance between two numbers of 16 bits, and would be lost there.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel

from atp.models.cut import place_before
from atp.removal.cut import base_of, merge_adapter


class NarrowOutput(nn.Module):
    """Placed before the class of embeddings whose weight is wider than the others: what they return is not."""

    narrow: torch.dtype

    def forward(self, input_ids: Tensor) -> Tensor:
        """States [batch, tokens, hidden] of input_ids int64 [batch, tokens], in the dtype of the other weights."""
        stock: Any = super()
        states: Tensor = stock.forward(input_ids)
        return states.to(self.narrow)


def stored_dtype(model: PeftModel | PreTrainedModel) -> torch.dtype:
    """The dtype in which the weights of a model in training are exported: that of the frozen ones, where there are any.

    model: a LoRA model, or what `whole_model` made of one.
    """
    if isinstance(model, PeftModel):
        base: Any = model.get_base_model()
        norm = getattr(base.get_decoder(), "norm", None)  # families that cannot be cut have other names
        return cast(torch.dtype, base.dtype if norm is None else norm.weight.dtype)
    return cast(torch.dtype, model.config.dtype)


def train_embeddings(model: PeftModel) -> None:
    """Makes the input embeddings of a LoRA model trained parameters, in float32 or wider, in place.

    States that they return keep their dtype. A head that shares the weight is trained with it, any other stays frozen.
    """
    base = cast(PreTrainedModel, model.get_base_model())
    embeddings, dtype = base.get_input_embeddings(), stored_dtype(model)
    weight = cast(nn.Parameter, embeddings.weight)
    weight.requires_grad_(True)
    wide = _widened(dtype)
    if wide != dtype and not isinstance(embeddings, NarrowOutput):
        weight.data = weight.data.to(wide)
        _round_factor(embeddings, dtype)
        place_before(embeddings, NarrowOutput).narrow = dtype


def store_embeddings(model: PeftModel) -> None:
    """Undoes `train_embeddings`: the weight is rounded to the dtype of the others, and no longer trained."""
    embeddings: Any = cast(PreTrainedModel, model.get_base_model()).get_input_embeddings()
    embeddings.weight.requires_grad_(False)
    if isinstance(embeddings, NarrowOutput):
        embeddings.weight.data = embeddings.weight.data.to(embeddings.narrow)
        embeddings.__class__ = type(embeddings).__bases__[1]


@torch.no_grad()
def whole_model(model: PeftModel, *, merged: bool = True) -> PreTrainedModel:
    """A plain model whose weights are all trained, in float32 or wider: V = W + scaling * B A, rounded once.

    merged: False leaves the adapter out, for weights that come from elsewhere. What keeps its dtype is shared with
    `model`. Its config says in which dtype the weights are stored.
    """
    dtype = stored_dtype(model)
    wide = _widened(dtype)
    plain = merge_adapter(model, wide) if merged else base_of(model)
    for weight in plain.parameters():
        weight.data = weight.data.to(wide)
        weight.requires_grad_(True)
    if wide != dtype:
        _round_factor(plain.get_input_embeddings(), dtype)
    plain.config.dtype = dtype
    return plain


@torch.no_grad()
def as_stored(model: PeftModel | PreTrainedModel, *, merged: bool = True) -> PreTrainedModel:
    """The plain model to export, with the adapter merged in; what was trained in float32 is rounded to `stored_dtype`.

    merged: False leaves the adapter out. Weights that stay what they are, are shared with `model`.
    """
    if isinstance(model, PeftModel):
        plain = merge_adapter(model) if merged else base_of(model)
        embeddings = cast(PreTrainedModel, model.get_base_model()).get_input_embeddings()
        rounded = [plain.get_input_embeddings().weight] if isinstance(embeddings, NarrowOutput) else []
    else:
        plain = base_of(model)
        rounded = list(plain.parameters())
    for weight in rounded:
        weight.data = weight.data.to(stored_dtype(model))
    return plain


def _widened(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _round_factor(embeddings: Any, dtype: torch.dtype) -> None:
    """Rounds what Gemma multiplies embeddings by as the stored model will, whose weights it takes the dtype of."""
    factor = getattr(embeddings, "embed_scale", None)
    if isinstance(factor, Tensor):
        embeddings.embed_scale = factor.to(dtype).to(factor.dtype)
