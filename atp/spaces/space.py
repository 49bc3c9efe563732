"""The one table that says which weights a decision removes.

A decision is one group of weights. `MaskSpace` lists, for every decoder layer and structure, the cuts it makes: which
linear, which axis, and which decision owns each row or column. Whoever needs to know what a decision touches reads
this table and nothing else. Two spaces exist: `head_dim` (the paper's, 1-method.md section 1) and `kv_group`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from transformers import PretrainedConfig

from atp.families import Linear, UnsupportedModel, family_of

SpaceName = Literal["head_dim", "kv_group"]


@dataclass(frozen=True)
class Cut:
    """One linear that a structure cuts, and along which axis.

    module: name of the linear inside its decoder layer, e.g. `self_attn.q_proj`.
    axis: 0 cuts outputs (rows of the weight and of LoRA B), 1 cuts inputs (columns of the weight and of LoRA A).
    owner: int64 [size of that axis], the decision of the structure that owns each row or column.
    """

    module: str
    axis: int
    owner: Tensor


@dataclass(frozen=True)
class Structure:
    """A set of equivalent decisions in one layer (`qk`, `vo`, `mlp`, ...) and the cuts they make.

    size: number of decisions. start: position of the first one in the flat vector of all decisions of the model.
    """

    name: str
    layer: int
    size: int
    start: int
    cuts: tuple[Cut, ...]

    @property
    def span(self) -> slice:
        """The decisions of this structure in the flat vector."""
        return slice(self.start, self.start + self.size)


class MaskSpace:
    """All decisions of a model as one flat vector, and the table of what each one removes.

    A mask over the space is a tensor [size]: bool or 0/1 (hard, True keeps) or in [0, 1] (soft).
    """

    def __init__(self, name: str, structures: list[Structure], linears: dict[str, Linear], norm_params: int):
        """structures in layer order; linears by name inside a layer; norm_params: unprunable parameters a layer.

        `structure_of`, int64 [size], tells for every decision which structure (by its place in the list) it belongs to.
        """
        self.name = name
        self.structures = structures
        self.linears = linears
        self.norm_params = norm_params
        self.num_layers = structures[-1].layer + 1
        self.size = structures[-1].start + structures[-1].size
        sizes = torch.tensor([structure.size for structure in structures])
        self.structure_of = torch.arange(len(structures)).repeat_interleave(sizes)

    @classmethod
    def from_config(cls, config: PretrainedConfig, space: SpaceName = "head_dim") -> MaskSpace:
        """Builds the table from a transformers config. Raises `UnsupportedModel` with the remedy."""
        family = family_of(config)
        if space not in _TABLES:
            raise UnsupportedModel(f"unknown mask space '{space}': use one of {', '.join(_TABLES)}")
        reason = family.refuses(config, space)
        if reason:
            raise UnsupportedModel(f"space '{space}' does not fit model family '{family.name}': {reason}")
        inner = config.intermediate_size
        heads, kv_heads, head_dim = config.num_attention_heads, config.num_key_value_heads, family.head_dim(config)
        table = _TABLES[space](heads, kv_heads, head_dim) + [_mlp(inner)]
        structures, start = [], 0
        for layer in range(config.num_hidden_layers):
            for name, size, cuts in table:
                structures.append(Structure(name, layer, size, start, cuts))
                start += size
        return cls(space, structures, family.linears(config), family.norm_params(config))

    def layer(self, index: int) -> list[Structure]:
        """The structures of one layer."""
        return [s for s in self.structures if s.layer == index]

    def kept_by_layer(self, mask: Tensor) -> dict[str, list[float]]:
        """Share of the decisions of each structure that a hard mask [size] keeps, one value in [0, 1] a layer."""
        kept = torch.bincount(self.structure_of, mask.cpu(), minlength=len(self.structures))
        shares: dict[str, list[float]] = {}
        for structure, count in zip(self.structures, kept.tolist(), strict=True):
            shares.setdefault(structure.name, []).append(round(count / structure.size, 4))
        return shares

    def module_masks(self, mask: Tensor) -> Iterator[tuple[int, str, Tensor | None, Tensor | None]]:
        """Yields (layer, module, out_mask [out] or None, in_mask [in] or None), expanded from a flat mask [size].

        Differentiable: gradients of the expanded masks are summed back onto their decisions. Cuts of one owner table
        get one tensor, so that whoever meets it twice knows that it is the same mask.
        """
        for layer, structures in self.by_layer():
            sides: dict[str, list[Tensor | None]] = {name: [None, None] for name in self.linears}
            for structure in structures:
                values = mask[structure.span]
                owners = {id(cut.owner): cut.owner for cut in structure.cuts}
                expanded = {key: values[owner.to(mask.device)] for key, owner in owners.items()}
                for cut in structure.cuts:
                    sides[cut.module][cut.axis] = expanded[id(cut.owner)]
            for module, (out_mask, in_mask) in sides.items():
                yield layer, module, out_mask, in_mask

    def by_layer(self) -> Iterator[tuple[int, list[Structure]]]:
        """Yields (layer, its structures) in order."""
        per_layer = len(self.structures) // self.num_layers
        for layer in range(self.num_layers):
            yield layer, self.structures[layer * per_layer : (layer + 1) * per_layer]

    def describe(self, mask: Tensor) -> dict[str, list[int]]:
        """Kept decisions of a hard mask: for each structure name, one count a layer."""
        counts: dict[str, list[int]] = {}
        for structure in self.structures:
            counts.setdefault(structure.name, []).append(int(mask[structure.span].sum()))
        return counts

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


_Table = list[tuple[str, int, tuple[Cut, ...]]]


def _mlp(inner: int) -> tuple[str, int, tuple[Cut, ...]]:
    owner = torch.arange(inner)
    return "mlp", inner, (Cut("mlp.gate_proj", 0, owner), Cut("mlp.up_proj", 0, owner), Cut("mlp.down_proj", 1, owner))


def _head_dim(heads: int, kv_heads: int, head_dim: int) -> _Table:
    # RoPE rotates dimension i together with i + head_dim/2, so a qk decision covers the pair.
    pair = torch.arange(head_dim) % (head_dim // 2)
    dim = torch.arange(head_dim)
    return [
        ("qk", head_dim // 2, (Cut("self_attn.q_proj", 0, pair.repeat(heads)),
                               Cut("self_attn.k_proj", 0, pair.repeat(kv_heads)))),
        ("vo", head_dim, (Cut("self_attn.v_proj", 0, dim.repeat(kv_heads)),
                          Cut("self_attn.o_proj", 1, dim.repeat(heads)))),
    ]  # fmt: skip


def _kv_group(heads: int, kv_heads: int, head_dim: int) -> _Table:
    of_kv = torch.arange(kv_heads).repeat_interleave(head_dim)
    of_query = torch.arange(kv_heads).repeat_interleave(heads // kv_heads * head_dim)
    cuts = (
        Cut("self_attn.q_proj", 0, of_query),
        Cut("self_attn.k_proj", 0, of_kv),
        Cut("self_attn.v_proj", 0, of_kv),
        Cut("self_attn.o_proj", 1, of_query),
    )
    return [("kv_group", kv_heads, cuts)]


_TABLES = {"head_dim": _head_dim, "kv_group": _kv_group}
