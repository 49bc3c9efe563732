"""A causal LM whose frozen weights are sharded by torch's `fully_shard`, and what reads and writes its shards.

Each decoder layer, the embeddings and the head are gathered on their own and dropped again after use. The adapter stays
whole in every process: it is small, everything that decides and shrinks reads whole groups of it, and its gradients are
summed once a step (docs/scale.md).
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.functional import linear
from transformers import PreTrainedModel

from atp.processes import processes

ReadRows = Callable[[str, slice], Tensor]
"""Gives the rows of a weight, by its name in the model. All processes ask for all names, in the same order."""


class TiedHead(nn.Module):
    """The head of a model that has no weight of its own: it multiplies by the embeddings, which are gathered for it."""

    def __init__(self, embeddings: nn.Module) -> None:
        super().__init__()
        self._embeddings = (embeddings,)  # no submodule, so that their weight has one name

    @property
    def weight(self) -> Tensor:
        """The embeddings, [vocab, hidden]; in shards."""
        return cast(Tensor, self._embeddings[0].weight)

    def forward(self, x: Tensor) -> Tensor:
        """Logits [..., vocab] of hidden states [..., hidden]."""
        weight = whole(self.weight)
        return linear(x, weight if torch.is_autocast_enabled(x.device.type) else weight.to(x.dtype))


def shard(model: PreTrainedModel, device: torch.device) -> None:
    """Shards a causal LM on the meta device, in place, and makes room for this process's rows, which hold anything.

    Fill them with `fill`. Buffers that no file holds must be set too.
    """
    options: dict[str, Any] = {
        "mesh": init_device_mesh(device.type, (processes.count(),)), "reshard_after_forward": True
    }  # fmt: skip
    decoder: Any = model.get_decoder()
    embeddings, head = model.get_input_embeddings(), cast(nn.Module, model.get_output_embeddings())
    if head.weight is embeddings.weight:
        model.set_output_embeddings(TiedHead(embeddings))
    else:
        fully_shard(head, **options)
    for part in (embeddings, *decoder.layers):
        fully_shard(part, **options)
    fully_shard(decoder, **options)  # the root, whose last norm is left; it overlaps gathering with computing
    model.requires_grad_(False).to_empty(device=device)
    decoder.rotary_emb = type(decoder.rotary_emb)(decoder.rotary_emb.config).to(device)
    if (factor := getattr(embeddings, "scalar_embed_scale", None)) is not None:
        cast(Any, embeddings).embed_scale.fill_(factor)


def sharded_copy(model: PreTrainedModel, device: torch.device) -> PreTrainedModel:
    """A whole causal LM that every process holds, in shards."""
    weights = dict(model.named_parameters())
    with torch.device("meta"):
        made = type(model)(copy.deepcopy(model.config))
    cast(nn.Module, made).to(dtype=model.dtype)
    shard(made, device)
    fill(made, lambda name, rows: weights[name][rows])
    made.generation_config = copy.deepcopy(model.generation_config)
    return made.train(model.training)


def is_sharded(model: PreTrainedModel) -> bool:
    """Whether `shard` made this model what it is."""
    return isinstance(model.get_decoder(), FSDPModule)


@torch.no_grad()
def fill(model: nn.Module, read: ReadRows) -> None:
    """Copies into every sharded weight the rows that this process holds."""
    for name, parameter in model.named_parameters():
        if isinstance(parameter, DTensor):
            store(parameter, read(name, rows_of(parameter)))


def rows_of(parameter: Tensor) -> slice:
    """The rows of a sharded weight that this process holds: shares of equal length, the last ones shorter or empty."""
    each = -(-len(parameter) // processes.count())
    start, end = (min(number * each, len(parameter)) for number in (processes.rank(), processes.rank() + 1))
    return slice(start, end)


def local(parameter: Tensor) -> Tensor:
    """This process's rows of a sharded weight, not copied."""
    return cast(DTensor, parameter.detach()).to_local()


@torch.no_grad()
def store(parameter: Tensor, rows: Tensor) -> None:
    """Writes this process's rows of a sharded weight."""
    local(parameter).copy_(rows)


@torch.no_grad()
def whole(tensor: Tensor) -> Tensor:
    """A sharded weight in one piece, gathered by all processes, who must all ask; any other tensor as it is."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


@contextmanager
def gathered(module: nn.Module) -> Iterator[dict[str, nn.Parameter]]:
    """Holds the weights of a sharded module whole inside a with block; yields its shards by name, which do not change.

    The model must have run forward once. Yields nothing for a module that is not sharded.
    """
    if not isinstance(module, FSDPModule):
        yield {}
        return
    shards: dict[str, nn.Parameter] = {
        name: parameter for name, parameter in module.named_parameters() if isinstance(parameter, DTensor)
    }
    module.unshard()
    try:
        yield shards
    finally:
        module.reshard()
