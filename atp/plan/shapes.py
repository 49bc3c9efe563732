"""What a model's layers look like before a run, and after it if all layers are cut alike."""

from __future__ import annotations

import bisect
import math
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import islice

import torch
from torch import Tensor
from transformers import PretrainedConfig

from atp.config import DecisionsConfig
from atp.decide.budget import Budget
from atp.decide.rules import width_rules
from atp.families import Linear
from atp.models.config import ATPLlamaConfig
from atp.removal import cut_config
from atp.spaces.space import MaskSpace

_HALVINGS = 50


@dataclass(frozen=True)
class LayerWidths:
    """One decoder layer: its linears by name, and the heads that the sides of its attention linears are made of.

    qk_dim, v_dim: width of a query or key head and of a value head.
    """

    linears: dict[str, Linear]
    heads: int
    kv_heads: int
    qk_dim: int
    v_dim: int

    @property
    def weights(self) -> int:
        """Entries of all weight matrices, biases left out."""
        return sum(linear.out_features * linear.in_features for linear in self.linears.values())

    def adapter(self, rank: int) -> int:
        """Parameters of LoRA on all linears: `rank` times rows and columns of each."""
        return sum(rank * (linear.out_features + linear.in_features) for linear in self.linears.values())

    def largest(self) -> int:
        """Entries of the largest weight matrix."""
        return max(linear.out_features * linear.in_features for linear in self.linears.values())


@dataclass(frozen=True)
class ModelShapes:
    """A model before the cut, and after a cut that leaves the same widths in all layers.

    counts: kept decisions of each structure in every layer. multiples: what those counts are rounded to. share: of the
    decoder parameters that these counts keep. cut_config: config of the cut model.
    """

    config: PretrainedConfig
    space: MaskSpace
    multiples: dict[str, int]
    counts: dict[str, int]
    share: float
    cut_config: ATPLlamaConfig
    whole: LayerWidths
    kept: LayerWidths

    @classmethod
    def of(cls, config: PretrainedConfig, decisions: DecisionsConfig) -> ModelShapes:
        """The shapes that `target_keep` and `multiples` lead to. Raises `UnsupportedModel` for other families."""
        space = MaskSpace.from_config(config, decisions.space)
        budget = Budget(space)
        multiples = width_rules(budget, decisions.target_keep, decisions.multiples)
        counts = equal_counts(budget, decisions.target_keep, multiples)
        mask = mask_of(space, counts)
        cut = cut_config(config, space, mask)
        kept = {}
        for _, name, rows, columns in islice(space.module_masks(mask), len(space.linears)):
            linear = space.linears[name]
            kept[name] = Linear(
                linear.out_features if rows is None else int(rows.sum()),
                linear.in_features if columns is None else int(columns.sum()),
                linear.bias,
            )
        share = float(budget.parameters(_by_structure(space, counts))) / budget.total
        whole = _widths(ATPLlamaConfig.from_whole(config), space.linears)
        return cls(config, space, multiples, counts, share, cut, whole, _widths(cut, kept))

    @property
    def layers(self) -> int:
        """Number of decoder layers."""
        return self.space.num_layers


def equal_counts(budget: Budget, target: float, multiples: dict[str, int]) -> dict[str, int]:
    """For each structure the decisions that every layer keeps, so that the decoder's share is close to the target.

    All structures but one get the count nearest to the share that whole numbers are not asked for. The one that the
    space marks as the remainder then gets the count that brings the whole decoder nearest to the target. Counts are
    multiples of `multiples` (default 1), or the whole structure, and at least one block.
    """
    structures = budget.space.layer(0)
    sizes = {s.name: s.size for s in structures}

    def share(counts: Mapping[str, float]) -> float:
        return float(budget.parameters(_by_structure(budget.space, counts))) / budget.total

    low, high = 0.0, 1.0
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        fits = share({name: middle * size for name, size in sizes.items()}) <= target
        low, high = (middle, high) if fits else (low, middle)
    counts = {}
    for name, size in sizes.items():
        step = multiples.get(name, 1)
        counts[name] = min(max(round(low * size / step), 1) * step, size)
    (rest,) = (s.name for s in structures if s.remainder)
    step = multiples.get(rest, 1)
    blocks = range(1, math.ceil(sizes[rest] / step) + 1)

    def with_blocks(number: int) -> dict[str, int]:
        return counts | {rest: min(number * step, sizes[rest])}

    above = bisect.bisect_right(blocks, target, key=lambda number: share(with_blocks(number)))
    nearest = {blocks[min(max(index, 0), len(blocks) - 1)] for index in (above - 1, above)}
    return with_blocks(min(sorted(nearest), key=lambda number: abs(share(with_blocks(number)) - target)))


def mask_of(space: MaskSpace, counts: dict[str, int]) -> Tensor:
    """A mask bool [space.size] that keeps the first `counts` decisions of each structure in every layer."""
    mask = torch.zeros(space.size, dtype=torch.bool)
    for structure in space.structures:
        mask[structure.start : structure.start + counts[structure.name]] = True
    return mask


def _by_structure(space: MaskSpace, counts: Mapping[str, float]) -> Tensor:
    """The counts as `Budget.parameters` takes them, float64 [structures of the space]."""
    return torch.tensor([float(counts[structure.name]) for structure in space.structures], dtype=torch.float64)


def _widths(config: ATPLlamaConfig, linears: dict[str, Linear]) -> LayerWidths:
    shape = config.layer_shape(0)
    return LayerWidths(
        linears, shape.num_attention_heads, shape.num_key_value_heads, shape.qk_head_dim(config.uncut_head_dim),
        shape.v_head_dim,
    )  # fmt: skip
