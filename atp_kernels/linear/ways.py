"""Which way a masked LoRA linear goes in eager mode: what a tuned table says for its shape, else what is known anyway.

Beside the backends there are two ways: `sliced`, the vendor's products of the part that bool masks keep, and `folded`,
one product with a copy of the weight into which masks and adapter are multiplied.
"""

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from atp_kernels import checks
from atp_kernels.call import override, select, shown
from atp_kernels.kept.sides import count_kept
from atp_kernels.linear import folded
from atp_kernels.linear.operands import Operands, prepare
from atp_kernels.linear.tiles import GemmConfig, descriptor_tiles
from atp_kernels.quantized import QuantizedWeight
from atp_kernels.tuning.table import FOLDED, SLICED, Key, Tile, tables_of

FEWEST_ROWS, LARGEST_SHARE, LEAST_SAVED = 256, 0.75, 2**28
"""Where slicing the weight anew in each call pays on a CPU: the rows, the share that is kept, and the multiplications
that a product is spared. With 1,024 rows, 0.6 kept and float32, a slice made beforehand was as fast as the addmm idiom
without masks at 576 x 576 (2^27 spared), and 1.1x to 1.5x as fast at 1536 x 576 (benchmarks/results)."""


class Way(NamedTuple):
    """How a call is computed, and why. module: the backend, None for `sliced` and `folded`."""

    name: str
    why: str
    module: Any = None


@dataclass(frozen=True)
class Tiled:
    """The Triton backend with one tile for all its products; called as the backend is."""

    forward: Callable[..., Any]
    backward: Callable[..., Any]
    ADDMM_CHAIN: bool = False


def way_of(operands: Operands, rank: int, mask_lora: bool) -> Way | None:
    """The way of a call without dropout and norms, None where `select` alone decides.

    The operands are checked and cast; rank: that of the adapter before it may have become a part of the weight.
    """
    x, weight, *_, out_mask, in_mask = operands
    tables = tables_of(x.device)
    if not tables and (mask_lora or x.device.type != "cpu" or (out_mask is None and in_mask is None)):
        return None  # the usual call, at the price of one look-up
    if override() or x.numel() == 0 or weight.numel() == 0 or isinstance(weight, QuantizedWeight):
        return None  # a quantised weight is dequantised in each pass, whichever part of it counts
    regime = regime_of(operands, mask_lora)
    if regime is None:
        return None
    (n, k), rows = weight.shape, x.numel() // weight.shape[1]
    key = Key(regime, shown(x.dtype), rows, n, k, rank)
    if regime != "search":
        return _tuned(key, operands, mask_lora)
    known = any(table.near(key) for table in tables)
    # A GPU is waited for at the first sight of a mask, for which there has to be a reason, and cannot be in a capture.
    if not (known and not checks.is_capturing(x.device) or (x.device.type == "cpu" and rows >= FEWEST_ROWS)):
        return None
    key = replace(key, kept=share_of(operands))
    return _tuned(key, operands, mask_lora) or by_rule(x.device, key)


def regime_of(operands: Operands, mask_lora: bool) -> str | None:
    """Which regime of a tuned table a call belongs to: frozen weight and bias, and masks and factors as there."""
    _, weight, lora_a, lora_b, bias, _, out_mask, in_mask = operands
    learns = torch.is_grad_enabled()
    if learns and (weight.requires_grad or (bias is not None and bias.requires_grad)):
        return None
    if out_mask is None and in_mask is None:
        return "cut"
    if mask_lora:
        frozen = not (learns and (lora_a.requires_grad or lora_b.requires_grad))
        return "decision" if frozen else None
    return "search" if all(mask is None or mask.dtype == torch.bool for mask in (out_mask, in_mask)) else None


def share_of(operands: Operands) -> float:
    """The share of the weight that bool masks keep."""
    kept = [1.0 if mask is None else count_kept(mask) / mask.numel() for mask in (operands.out_mask, operands.in_mask)]
    return kept[0] * kept[1]


def explained(tensors: Sequence[Tensor], backend: str, **given: Any) -> tuple[str, str]:
    """(the way of a call, why) for `explain`; given: the keyword arguments of the call that decide it."""
    optional = {name: given.pop(name, None) for name in ("bias", "lora_input", "out_mask", "in_mask")}
    mask_lora, dropout = given.pop("mask_lora", False), given.pop("dropout", 0.0)
    if given:
        raise ValueError(f"a masked LoRA linear does not depend on {', '.join(given)}: leave it out of explain.")
    rank = tensors[2].shape[0]
    operands = prepare(Operands(*tensors, **optional))
    way = way_of(operands, rank, mask_lora) if backend == "auto" and not dropout else None
    if way is not None:
        return way.name, way.why
    plain = operands.out_mask is None and operands.in_mask is None and not dropout
    choice = select("masked_lora_linear", operands.x.device, operands.x.dtype, backend, plain=plain)
    tables = ", ".join(str(table.path) for table in tables_of(operands.x.device)) if backend == "auto" else ""
    return choice.name, f"{choice.why}; nothing for this call in {tables}" if tables else choice.why


def backend_way(name: str, tile: Tile | None, why: str, device: torch.device, dtype: torch.dtype) -> Way:
    """A backend as a way; a tile fixes that of Triton. Raises RuntimeError where the backend does not take the call."""
    module: Any = select("masked_lora_linear", device, dtype, name).module
    if tile is None:
        return Way(name, why, module)
    if isinstance(tile, str):
        found = descriptor_tiles(dtype).get(tile)
        if found is None:
            raise RuntimeError(f"no tile of tensor descriptors in {shown(dtype)} is called {tile}.")
        config: GemmConfig = found
        said = f"in tiles {tile} of tensor descriptors"
    else:
        block_m, block_n, block_k, warps, stages = tile
        config = GemmConfig(block_m, block_n, block_k, warps, stages)
        said = f"in tiles of {block_m}x{block_n}x{block_k}, {warps} warps, {stages} stages"
    tiled = Tiled(partial(module.forward, config=config), partial(module.backward, config=config))
    return Way(name, f"{why}, {said}", tiled)


def by_rule(device: torch.device, key: Key) -> Way | None:
    """What is known of search without a table, None where `select` decides."""
    saved = key.m * key.n * key.k * (1 - key.kept)
    if device.type != "cpu" or key.m < FEWEST_ROWS or key.kept > LARGEST_SHARE or saved < LEAST_SAVED:
        return None
    why = f"masks that keep {key.kept:.2f} of the weight pay for a slice in each call with so many rows; no tuned entry"
    return Way(SLICED, why)


def _tuned(key: Key, operands: Operands, mask_lora: bool) -> Way | None:
    for table in tables_of(operands.x.device):
        entry = table.find(key)
        if entry is None or (entry.way == FOLDED and folded.refuses(operands, mask_lora)):
            continue
        why = f"the fastest for {key.regime} in {table.path}"
        if entry.way in (SLICED, FOLDED):
            return Way(entry.way, why)
        return _backend_way(entry.way, entry.tile, why, operands.x.device, operands.x.dtype)
    return None


@cache
def _backend_way(name: str, tile: Tile | None, why: str, device: torch.device, dtype: torch.dtype) -> Way | None:
    try:
        return backend_way(name, tile, why, device, dtype)
    except RuntimeError as error:
        warnings.warn(f"A tuned table is not followed: {error}", RuntimeWarning, stacklevel=2)
        return None
