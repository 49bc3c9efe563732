"""Decisions in rounds: part of the way is cut and refitted first, and what is left is judged anew.

The saliency of a decision says what removing it costs while all others stay. Where most go, that says less and less of
what they are worth together, so each round asks a smaller model (docs/method.md section 9).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from atp.sharding.shards import local
from atp.spaces.space import MaskSpace
from atp_kernels import QuantizedWeight


def round_targets(target: float, rounds: int) -> list[float]:
    """The round_targets that all rounds but the last keep: each is smaller than the one before by the same factor."""
    return [target ** (number / rounds) for number in range(1, rounds)]


@contextmanager
def undone(decoder: nn.Module, space: MaskSpace) -> Iterator[None]:
    """What a refit inside the with block does to the base weights of `decoder` is undone, bit for bit, at its end.

    Holds a copy of the linears that end a block, or of this process's shards of them; a quantized weight, which a refit
    replaces, is kept as it is.
    """
    layers: Any = decoder.layers
    kept: list[tuple[nn.Module, nn.Parameter, Tensor | None]] = []
    for structure in space.structures:
        if structure.reader is not None and structure.size:
            linear = layers[structure.layer].get_submodule(structure.reader).get_base_layer()
            weight = linear.weight
            kept.append((linear, weight, None if isinstance(weight, QuantizedWeight) else _own(weight).clone()))
    try:
        yield
    finally:
        with torch.no_grad():
            for linear, weight, values in kept:
                if values is None:
                    linear.weight = weight
                else:
                    _own(weight).copy_(values)


def _own(weight: Tensor) -> Tensor:
    return local(weight) if isinstance(weight, DTensor) else weight.detach()
