"""What a model's layers look like before a run, and after it if all layers are cut alike."""

from __future__ import annotations

import bisect
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PretrainedConfig

from atp.config import DecisionsConfig
from atp.config.config import LoraSection
from atp.decide.budget import Budget
from atp.decide.rules import width_rules
from atp.families import ExpertFamily, Linear, Routed, family_of, layer_config
from atp.models.config import CutConfig
from atp.removal import cut_config
from atp.spaces.mlp import mlp_linears
from atp.spaces.space import MaskSpace

_HALVINGS = 50


@dataclass(frozen=True)
class LayerWidths:
    """One decoder layer: its linears by name, and the heads that the sides of its attention linears are made of.

    qk_dim, v_dim: width of a query or key head and of a value head. padded: whether heads are narrower
    than head_dim, and so padded. experts: what stands in place of the MLP, which then is not among the linears.
    """

    linears: dict[str, Linear]
    heads: int
    kv_heads: int
    qk_dim: int
    v_dim: int
    padded: bool
    experts: Routed | None = None

    @property
    def weights(self) -> int:
        """Entries of all weight matrices, biases and experts left out."""
        return sum(linear.out_features * linear.in_features for linear in self.linears.values())

    @property
    def stacked(self) -> int:
        """Parameters of the experts and their router."""
        return 0 if self.experts is None else self.experts.experts * (self.experts.weights + self.experts.hidden)

    @property
    def active(self) -> int:
        """Entries of the weights that a token meets, of experts those that it takes."""
        found = self.experts
        return self.weights + (0 if found is None else found.taken * found.weights + found.experts * found.hidden)

    @property
    def inner(self) -> int:
        """Channels of the MLP that a token goes through."""
        if self.experts is None:
            return self.linears[mlp_linears(self.linears)[-1]].in_features
        return self.experts.taken * self.experts.inner

    def adapter(self, rank: int, experts: int = 0) -> int:
        """Parameters of LoRA on all linears and so many experts: `rank` times rows and columns of each."""
        each = 0 if self.experts is None else 3 * self.experts.inner + 2 * self.experts.hidden
        sides = sum(linear.out_features + linear.in_features for linear in self.linears.values())
        return rank * (sides + experts * each)

    def largest(self) -> int:
        """Entries of the largest weight matrix."""
        return max(linear.out_features * linear.in_features for linear in self.linears.values())


Layers = tuple[LayerWidths, ...]
"""All decoder layers of a model, in order."""


def adapter_params(layers: Layers, lora: LoraSection) -> int:
    """Parameters of the adapter of these layers; with DoRA also a magnitude for each of the rows of their linears."""
    linears = [linear for widths in layers for linear in widths.linears.values()]
    rows = sum(linear.out_features for linear in linears) if lora.variant == "dora" else 0
    experts = [widths.experts.experts if lora.experts and widths.experts else 0 for widths in layers]
    return sum(widths.adapter(lora.r, count) for widths, count in zip(layers, experts, strict=True)) + rows


def weights_of(layers: Layers) -> int:
    """Entries of all weight matrices of these layers, biases left out."""
    return sum(widths.weights for widths in layers)


@dataclass(frozen=True)
class ModelShapes:
    """A model before the cut, and after a cut that keeps the same share of every layer.

    counts: by structure, the kept decisions of each layer. multiples: what those counts are rounded to. share: of the
    decoder parameters that these counts keep. cut_config: config of the cut model.
    """

    config: PretrainedConfig
    space: MaskSpace
    multiples: dict[str, int]
    counts: dict[str, list[int]]
    share: float
    cut_config: CutConfig
    whole: Layers
    kept: Layers

    @classmethod
    def of(cls, config: PretrainedConfig, decisions: DecisionsConfig, device: str | None = None) -> ModelShapes:
        """The shapes that `target_keep` and `multiples` lead to. Raises `UnsupportedModel` for other families.

        device: as in `width_rules`.
        """
        space = MaskSpace.from_config(config, decisions.space)
        budget = Budget(space)
        target, blocks = decisions.target_keep, decisions.blocks
        multiples = width_rules(budget, target, decisions.multiples, device, blocks=blocks)
        counts = equal_counts(budget, target, multiples, blocks=blocks)
        mask = mask_of(space, counts)
        cut = cut_config(config, space, mask)
        kept: list[dict[str, Linear]] = [{} for _ in space.linears]
        gone = space.gone(mask)
        for layer, name, rows, columns in space.module_masks(mask):
            linear = space.linears[layer][name]
            if not linear.lora:
                continue
            if any(block.holds(name) for block in gone[layer]):
                kept[layer][name] = Linear(0, 0, False)
                continue
            kept[layer][name] = Linear(
                linear.out_features if rows is None else int(rows.sum()),
                linear.in_features if columns is None else int(columns.sum()),
                linear.bias,
            )
        linears = [{name: own[name] for name in space.adapted} for own in space.linears]
        whole = _widths(CutConfig.from_whole(config), linears)
        return cls(config, space, multiples, counts, budget.share(mask), cut, whole, _widths(cut, kept))

    @property
    def layers(self) -> int:
        """Number of decoder layers."""
        return self.space.num_layers


def equal_counts(
    budget: Budget, target: float, multiples: dict[str, int], *, blocks: bool = False
) -> dict[str, list[int]]:
    """By structure, the decisions that each layer keeps, so that the decoder's share is close to the target.

    All structures but one get the count nearest to the share that whole numbers are not asked for. The one that the
    space marks as the remainder then gets the count that brings the whole decoder nearest to the target. Counts are
    multiples of `multiples` (default 1), or the whole structure, and at least one block. Layers of equal size keep
    equal counts, others the same share. blocks: whether the last layers may keep nothing, where the target is out of
    reach otherwise; which blocks a run removes is not known before it.
    """
    sizes = {name: [s.size for s in layers] for name, layers in budget.space.by_name().items()}
    least = {name: layers[0].least for name, layers in budget.space.by_name().items()}
    steps = {name: layers[0].step(multiples) for name, layers in budget.space.by_name().items()}
    if blocks:
        _leave_out(budget, target, steps, sizes)

    def share(counts: Mapping[str, Sequence[float]]) -> float:
        return float(budget.parameters(_by_structure(budget.space, counts))) / budget.total

    low, high = 0.0, 1.0
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        fits = share({name: [middle * size for size in layers] for name, layers in sizes.items()}) <= target
        low, high = (middle, high) if fits else (low, middle)
    counts = {}
    for name, layers in sizes.items():
        step = steps[name]
        fewest = math.ceil(least[name] / step)
        counts[name] = [min(max(round(low * size / step), fewest) * step, size) for size in layers]
    (rest,) = (s.name for s in budget.space.layer(0) if s.remainder)
    step = steps[rest]
    most = math.ceil(max(sizes[rest]) / step)
    numbers = range(math.ceil(least[rest] / step), most + 1)

    def with_blocks(number: int) -> dict[str, list[int]]:
        """The largest layers keep this number of blocks, and smaller ones the same share of theirs."""
        own = ((size, round(number / most * math.ceil(size / step))) for size in sizes[rest])
        return counts | {rest: [min(max(kept, 1) * step, size) for size, kept in own]}

    above = bisect.bisect_right(numbers, target, key=lambda number: share(with_blocks(number)))
    nearest = {numbers[min(max(index, 0), len(numbers) - 1)] for index in (above - 1, above)}
    return with_blocks(min(sorted(nearest), key=lambda number: abs(share(with_blocks(number)) - target)))


def _leave_out(budget: Budget, target: float, steps: dict[str, int], sizes: dict[str, list[int]]) -> None:
    """Sets the sizes of all structures to 0 in as many layers, from the last on, as must keep nothing."""
    for layer in reversed(range(1, budget.space.num_layers)):
        fewest = {name: [min(steps[name], size) for size in layers] for name, layers in sizes.items()}
        if float(budget.parameters(_by_structure(budget.space, fewest))) <= target * budget.total:
            return
        for layers in sizes.values():
            layers[layer] = 0


def mask_of(space: MaskSpace, counts: Mapping[str, Sequence[int]]) -> Tensor:
    """A mask bool [space.size] that keeps the first decisions of each structure, `counts` of them in each layer."""
    mask = torch.zeros(space.size, dtype=torch.bool)
    for structure in space.structures:
        mask[structure.start + structure.first(counts[structure.name][structure.layer])] = True
    return mask


def _by_structure(space: MaskSpace, counts: Mapping[str, Sequence[float]]) -> Tensor:
    """The counts as `Budget.parameters` takes them, float64 [structures of the space]."""
    return torch.tensor([float(counts[s.name][s.layer]) for s in space.structures], dtype=torch.float64)


def _widths(config: CutConfig, linears: Sequence[dict[str, Linear]]) -> Layers:
    shapes, family = (config.layer_shape(layer) for layer in range(len(linears))), family_of(config)
    return tuple(
        LayerWidths(
            own, *shape.heads, shape.qk_head_dim(config.head_dim), shape.v_head_dim,
            padded=not shape.has_whole_heads(config.head_dim),
            experts=family.routed(layer_config(config, layer)) if isinstance(family, ExpertFamily) else None,
        )
        for layer, (own, shape) in enumerate(zip(linears, shapes, strict=True))
    )  # fmt: skip
