"""What a decision removes, and every question whose answer depends on the mask space (docs/method.md section 1).

A decision is one group of weights. A mask space lists, for every decoder layer and structure, the cuts that a decision
makes: which linear, which axis, and which decision owns each row or column. Structures also answer what else differs
between spaces: what a soft mask multiplies, which linear reads them, which sides may be reordered, which widths a cut
layer has. Everybody else asks these questions and never looks at the name of a space or structure.
"""

from __future__ import annotations

import copy
import importlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from transformers import PretrainedConfig

from atp.families import (
    BLOCKS,
    SKIPPED,
    Block,
    ExpertFamily,
    Family,
    Linear,
    UnsupportedModel,
    family_of,
    is_cut,
    layer_config,
)
from atp.spaces import BLOCK_SPACES, EXPERT_SPACES, STRUCTURES

WIDTHS = (64, 32, 16, 8, 4, 2)
"""Preferred multiples of a width of linears, the best first: 4-bit kernels and tensor cores want 64."""
CUDA_WIDTHS = (128,)
"""Those before them on CUDA, where matrix products are tiled by 128."""


@dataclass(frozen=True, eq=False)
class Cut:
    """One side of a linear that a structure cuts.

    module: name of the linear inside its decoder layer, e.g. `self_attn.q_proj`.
    axis: 0 cuts outputs (rows of the weight and of LoRA B), 1 cuts inputs (columns of the weight and of LoRA A).
    owner: int64 [size of that axis], the decision of the structure that owns each row or column.
    soft: whether a soft mask multiplies this side. False where its values arrive already multiplied.
    reorderable: whether the activations on this side may lie in any order, the same one on all sides of the structure
    with the same `owner` object.
    repeats: found from an owner on the host: (a, b) where it names each decision a times in turn, and all of that b
    times; None for any other order.
    """

    module: str
    axis: int
    owner: Tensor
    soft: bool = True
    reorderable: bool = False
    repeats: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        if self.owner.device.type == "cpu":  # reading it elsewhere would make the host wait
            object.__setattr__(self, "repeats", _repeats(self.owner))

    def expand(self, values: Tensor) -> Tensor:
        """Decisions [..., decisions] on this side, [..., features of that side], in new memory.

        An index sums gradients by sorting it on CUDA; the gradient of a repeat is a plain sum.
        """
        if self.repeats is None:
            return values[..., self.owner.to(values.device)]
        each, all_of_them = self.repeats
        shape = (*values.shape[:-1], all_of_them, values.shape[-1], each)
        return values[..., None, :, None].expand(shape).clone(memory_format=torch.contiguous_format).flatten(-3)


@dataclass(frozen=True, eq=False)
class Structure:
    """A set of equivalent decisions in one layer (`qk`, `vo`, `mlp`, ...), the cuts they make, and what follows.

    size: number of decisions.
    widths: maps (this structure, kept decisions bool [size]) to the keys of `LayerShape` that the cut sets.
    reader: the linear that reads this structure on its input side and ends its residual block; None without one.
    multiples: preferred multiples for the number of kept decisions, the best first; empty where any number is as good.
    cuda_multiples: those that come before them where the model trains on CUDA.
    groups: how many groups of equal size the decisions form, one after the other; a cut keeps equally many of each.
    unit: the multiple for the kept count of each group, where the config gives none.
    remainder: whether this is the structure that makes up the rest of a budget where all layers keep equal counts.
    least: the smallest number of decisions that a layer may keep, where it keeps any.
    block: the residual block (`self_attn`, `mlp`) that adds nothing without these decisions, so that all may go; None
    where some must stay.
    layer, start: set by `MaskSpace`; start is the position of the first decision in the flat vector of all decisions.
    """

    name: str
    size: int
    cuts: tuple[Cut, ...]
    widths: Callable[[Structure, Tensor], dict[str, Any]]
    reader: str | None = None
    multiples: tuple[int, ...] = ()
    cuda_multiples: tuple[int, ...] = ()
    remainder: bool = False
    least: int = 1
    block: str | None = None
    unit: int = 1
    groups: int = 1
    layer: int = 0
    start: int = 0

    @property
    def span(self) -> slice:
        """The decisions of this structure in the flat vector."""
        return slice(self.start, self.start + self.size)

    def step(self, multiples: Mapping[str, int]) -> int:
        """The multiple for the number of kept decisions: that of one group times the number of groups.

        multiples: from a structure's name to the multiple of one group. All decisions may always stay.
        """
        return multiples.get(self.name, self.unit) * self.groups

    def ranking(self, values: Tensor) -> Tensor:
        """The positions of all decisions, int64 [size], those with the largest values [size] first.

        The first n * groups of them are n of each group. Of equal values the first come first.
        """
        each = self.size // self.groups
        order = values.view(self.groups, each).argsort(dim=1, descending=True, stable=True)
        starts = torch.arange(self.groups, device=values.device) * each
        return (order + starts[:, None]).T.flatten()

    def first(self, count: int) -> Tensor:
        """The positions of the first `count` decisions, equally many of each group, int64."""
        return self.ranking(torch.zeros(self.size))[:count]

    def sides(self, mask: Tensor, *, soft: bool = False) -> Iterator[tuple[Cut, Tensor]]:
        """Yields each cut with a mask [..., size of the space] expanded to its side, [..., features of that side].

        soft: only the sides that a soft mask multiplies. Differentiable: gradients of the expanded masks are summed
        onto their decisions. Cuts with the same owner get the same tensor object.
        """
        values = mask[..., self.span]
        expanded: dict[int, Tensor] = {}
        for cut in self.cuts:
            if soft and not cut.soft:
                continue
            if id(cut.owner) not in expanded:
                expanded[id(cut.owner)] = cut.expand(values)
            yield cut, expanded[id(cut.owner)]

    def kept_inputs(self, mask: Tensor) -> Tensor:
        """The inputs of the reader that a hard mask [size of the space] keeps, bool [in_features]."""
        (cut,) = (cut for cut in self.cuts if cut.module == self.reader and cut.axis == 1)
        return mask[self.span][cut.owner]


Builder = Callable[[PretrainedConfig, dict[str, Linear]], list[Structure]]
"""Makes the structures of one layer from the config of this layer and its linears: `structures` of a space's file."""


class MaskSpace:
    """All decisions of a model as one flat vector, and the table of what each one removes.

    A mask over the space is a tensor [size]: bool or 0/1 (hard, True keeps) or in [0, 1] (soft). All layers have the
    same structures and linears by name; in a model that is cut already their sizes differ, and are 0 in a block that a
    layer lacks.
    """

    def __init__(
        self,
        name: str,
        structures: Sequence[list[Structure]],
        linears: Sequence[dict[str, Linear]],
        norms: Sequence[dict[str, int]],
        blocks: Sequence[Block] = BLOCKS,
    ):
        """structures: those of each layer. linears: of each layer, by name. norms: of each layer, parameters
        outside its linears by module. blocks: those of a layer, which say what goes with them.

        `modules` are the names of the linears of a layer, `adapted` those of linears that carry LoRA. `structure_of`,
        int64 [size], gives the position in `structures` of the structure that each decision belongs to. Raises
        ValueError for a table that does not cover each side that it cuts exactly once.
        """
        self.name, self.linears, self.norms, self.num_layers = name, linears, norms, len(linears)
        self.blocks = tuple(blocks)
        self.modules = tuple(linears[0])
        self.adapted = tuple(name for name, linear in linears[0].items() if linear.lora)
        self.structures: list[Structure] = []
        start = 0
        for layer, (own, of_layer) in enumerate(zip(structures, linears, strict=True)):
            if layer == 0 or own is not structures[layer - 1]:
                _check_table(name, own, of_layer)
            for structure in own:
                self.structures.append(replace(structure, layer=layer, start=start))
                start += structure.size
        self.size = start
        sizes = torch.tensor([structure.size for structure in self.structures])
        self.structure_of = torch.arange(len(self.structures)).repeat_interleave(sizes)

    @classmethod
    def from_config(cls, config: PretrainedConfig, space: str = "head_dim") -> MaskSpace:
        """Builds the table from a transformers config. Raises `UnsupportedModel` with the remedy."""
        family = family_of(config)
        if space not in STRUCTURES:
            raise UnsupportedModel(f"unknown mask space '{space}': use one of {', '.join(STRUCTURES)}")
        reason = (
            _refuses_dense_spaces(family, space) or family.refuses(config, space) or _refuses_lacking(config, space)
        )
        if reason:
            raise UnsupportedModel(f"space '{space}' does not fit model family '{family.name}': {reason}")
        module = importlib.import_module(f"atp.spaces.{space}")
        build: Builder = module.structures
        refine: Callable[..., None] | None = getattr(module, "table", None)  # where a space sees linears otherwise
        built: dict[tuple[tuple[str, Linear], ...], list[Structure]] = {}  # layers of one shape share their tables
        structures, linears, norms = [], [], []
        for layer in range(config.num_hidden_layers):
            own = layer_config(config, layer)
            linears.append(family.linears(own))
            norms.append(family.norm_params(own))
            if refine is not None:
                refine(own, linears[-1], norms[-1])
            shape = tuple(linears[-1].items())
            if shape not in built:
                built[shape] = build(own, linears[-1])
            structures.append(built[shape])
        return cls(space, structures, linears, norms, family.blocks)

    def to(self, device: torch.device) -> MaskSpace:
        """This space with its index tensors on a device, where masks are then expanded without a copy per side."""
        if self.structure_of.device == device:
            return self
        # Layers of one shape share their cuts, and the cuts of a structure may share an owner.
        owners: dict[int, Tensor] = {}
        cuts: dict[int, tuple[Cut, ...]] = {}
        for structure in self.structures:
            if id(structure.cuts) not in cuts:
                for cut in structure.cuts:
                    owners.setdefault(id(cut.owner), cut.owner.to(device))
                own = (replace(cut, owner=owners[id(cut.owner)]) for cut in structure.cuts)
                cuts[id(structure.cuts)] = tuple(own)
        moved = copy.copy(self)
        moved.structures = [replace(structure, cuts=cuts[id(structure.cuts)]) for structure in self.structures]
        moved.structure_of = self.structure_of.to(device)
        return moved

    # What a decision touches

    def layer(self, index: int) -> list[Structure]:
        """The structures of one layer."""
        per_layer = len(self.structures) // self.num_layers
        return self.structures[index * per_layer : (index + 1) * per_layer]

    def by_name(self) -> dict[str, list[Structure]]:
        """The structures of all layers by their names, in the order of the layers."""
        found: dict[str, list[Structure]] = {}
        for structure in self.structures:
            found.setdefault(structure.name, []).append(structure)
        return found

    @property
    def equal_layers(self) -> bool:
        """Whether all layers have the same widths."""
        return all(linears == self.linears[0] for linears in self.linears)

    def module_masks(
        self, mask: Tensor, *, soft: bool = False
    ) -> Iterator[tuple[int, str, Tensor | None, Tensor | None]]:
        """Yields (layer, module, out_mask [..., out] or None, in_mask [..., in] or None), from a flat mask [..., size].

        See `Structure.sides` for what the masks are.
        """
        for layer in range(self.num_layers):
            sides: dict[str, list[Tensor | None]] = {name: [None, None] for name in self.modules}
            for structure in self.layer(layer):
                for cut, side in structure.sides(mask, soft=soft):
                    sides[cut.module][cut.axis] = side
            for module, (out_mask, in_mask) in sides.items():
                yield layer, module, out_mask, in_mask

    # What a cut leaves

    def present(self, layer: int) -> dict[str, Linear]:
        """The linears of one layer by name, without those of a block that it lacks."""
        return {name: linear for name, linear in self.linears[layer].items() if linear.out_features}

    def read_by(self, layer: int, block: str) -> Structure | None:
        """The structure that the last linear of a residual block (`self_attn`, `mlp`) reads; None without one."""
        read = (s for s in self.layer(layer) if s.reader is not None and s.reader.startswith(f"{block}."))
        return next(read, None)

    def emptied(self, mask: Tensor) -> list[Structure]:
        """The structures of which a hard mask [size] leaves nothing, so that their block goes or is gone already."""
        kept = torch.bincount(self.structure_of, mask.cpu(), minlength=len(self.structures)).tolist()
        pairs = zip(self.structures, kept, strict=True)
        return [structure for structure, count in pairs if structure.block is not None and not count]

    def gone(self, mask: Tensor) -> list[list[Block]]:
        """For each layer the blocks that it lacks under a hard mask [size]."""
        names = {(structure.layer, structure.block) for structure in self.emptied(mask)}
        layers = range(self.num_layers)
        return [[block for block in self.blocks if (layer, block.module) in names] for layer in layers]

    def closed(self, mask: Tensor) -> set[tuple[int, str]]:
        """The linears (layer, name) that end an emptied block and have a bias, which goes with the block."""
        ends = {(s.layer, s.reader) for s in self.structures if s.block is not None and s.reader is not None}
        biased = {(layer, name) for layer, name in ends if self.linears[layer][name].bias}
        return biased & {(s.layer, s.reader) for s in self.emptied(mask) if s.reader is not None} if biased else biased

    def layer_widths(self, layer: int, mask: Tensor) -> dict[str, Any]:
        """The keys of `LayerShape` that a hard mask bool [size] sets in one layer, with their values."""
        kept = {s: mask[s.span].cpu() for s in self.layer(layer)}
        gone = [s.block for s, decisions in kept.items() if s.block is not None and not decisions.any()]
        left = ((s, decisions) for s, decisions in kept.items() if s.block not in gone)
        widths = {key: value for s, decisions in left for key, value in s.widths(s, decisions).items()}
        return widths | ({"skip": [SKIPPED[block] for block in gone]} if gone else {})

    # Records

    def kept_by_layer(self, mask: Tensor) -> dict[str, list[float]]:
        """Share of each structure's decisions that a hard mask [size] keeps: one value in [0, 1] per layer."""
        kept = torch.bincount(self.structure_of, mask.cpu(), minlength=len(self.structures))
        shares: dict[str, list[float]] = {}
        for structure, count in zip(self.structures, kept.tolist(), strict=True):
            shares.setdefault(structure.name, []).append(round(count / max(structure.size, 1), 4))
        return shares

    def describe(self, mask: Tensor) -> dict[str, list[int]]:
        """Kept decisions of a hard mask: for each structure name, one count per layer."""
        return {name: [int(mask[s.span].sum()) for s in structures] for name, structures in self.by_name().items()}

    def kept_indices(self, mask: Tensor) -> list[dict[str, list[int]]]:
        """For each layer, the kept decisions of every structure by name (the form that decisions.json holds)."""
        layers: list[dict[str, list[int]]] = [{} for _ in range(self.num_layers)]
        for structure in self.structures:
            layers[structure.layer][structure.name] = mask[structure.span].nonzero().flatten().tolist()
        return layers

    def mask_from_indices(self, layers: list[dict[str, list[int]]]) -> Tensor:
        """The inverse of `kept_indices`: bool [size]."""
        mask = torch.zeros(self.size, dtype=torch.bool)
        for structure in self.structures:
            kept = torch.tensor(layers[structure.layer][structure.name], dtype=torch.long)
            mask[structure.start + kept] = True
        return mask


def _refuses_dense_spaces(family: Family, space: str) -> str | None:
    experts = isinstance(family, ExpertFamily) and space not in EXPERT_SPACES
    return f"its MLPs are experts behind a router, so use {family.space}" if experts else None


def _refuses_lacking(config: PretrainedConfig, space: str) -> str | None:
    lacking = config.lacking() if is_cut(config) and space not in BLOCK_SPACES else None
    return None if lacking is None else f"the model is cut already and its {lacking}: use {' or '.join(BLOCK_SPACES)}"


def _repeats(owner: Tensor) -> tuple[int, int] | None:
    if owner.numel() == 0:
        return None
    size, each = int(owner.max()) + 1, int((owner == owner[0]).int().cumprod(0).sum())
    decisions = torch.arange(size).repeat_interleave(each)
    all_of_them = len(owner) // len(decisions)
    return (each, all_of_them) if torch.equal(owner, decisions.repeat(all_of_them)) else None


def _check_table(space: str, structures: list[Structure], linears: dict[str, Linear]) -> None:
    """Refuses a table that misses or repeats part of a side or contradicts itself, because a cut would follow it."""
    seen: set[tuple[str, int]] = set()
    for structure in structures:
        if not any(cut.soft for cut in structure.cuts):
            raise ValueError(f"mask space '{space}', structure '{structure.name}': a soft mask must multiply one side")
        if structure.reader is not None and (structure.reader, 1) not in {(c.module, c.axis) for c in structure.cuts}:
            raise ValueError(
                f"mask space '{space}', structure '{structure.name}': cut the inputs of its reader {structure.reader}"
            )
        for cut in structure.cuts:
            where = f"mask space '{space}', structure '{structure.name}', {cut.module} axis {cut.axis}"
            linear = linears[cut.module]
            width = linear.in_features if cut.axis else linear.out_features
            if cut.owner.shape != (width,) or not torch.equal(cut.owner.unique(), torch.arange(structure.size)):
                raise ValueError(
                    f"{where}: owner must give each of {width} positions one of {structure.size} decisions"
                )
            if (cut.module, cut.axis) in seen:
                raise ValueError(f"{where}: this side is cut twice")
            seen.add((cut.module, cut.axis))
    if sum(structure.remainder for structure in structures) != 1:
        raise ValueError(f"mask space '{space}' needs exactly one structure with remainder=True")
