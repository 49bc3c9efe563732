"""Which way a masked LoRA linear goes in eager mode: what a tuned table says for its shape, else what is known anyway.

Beside the backends there are two ways: `sliced`, the vendor's products of the part that bool masks keep, and `folded`,
one product with a copy of the weight into which masks and adapter are multiplied.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from atp_kernels import checks
from atp_kernels.call import override, select, shown
from atp_kernels.kept.sides import count_kept
from atp_kernels.linear import folded
from atp_kernels.linear.operands import Operands, prepare
from atp_kernels.quantized import QuantizedWeight
from atp_kernels.tuning.table import FOLDED, SLICED, Key, tables_of
from atp_kernels.tuning.tiled import followed

FEWEST_ROWS, LARGEST_SHARE, LEAST_SAVED = 256, 0.75, 2**28
"""Where slicing the weight anew in each call pays on a CPU: the rows, the share that is kept, and the multiplications
that a product is spared. With 1,024 rows, 0.6 kept and float32, a slice made beforehand was as fast as the addmm idiom
without masks at 576 x 576 (2^27 spared), and 1.1x to 1.5x as fast at 1536 x 576 (benchmarks/results)."""


class Way(NamedTuple):
    """How a call is computed, and why. module: the backend, None for `sliced` and `folded`."""

    name: str
    why: str
    module: Any = None


def way_of(operands: Operands, rank: int, mask_lora: bool) -> Way | None:
    """The way of a call without dropout, None where `select` alone decides.

    The operands are checked and cast; rank: that of the adapter before it may have become a part of the weight.
    """
    x, weight, lora_a, *_, out_mask, in_mask = operands
    # Masks on the sum of a base and an adapter that became part of it are masks on the base.
    mask_lora = mask_lora and not (lora_a.shape[0] == 0 and _are_hard(out_mask, in_mask))
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


def backend_in_table(operands: Operands, rank: int) -> Any:
    """The backend that a tuned table names for a linear within an MLP, which can be no other way; None without one."""
    if not tables_of(operands.x.device):
        return None
    way = way_of(operands, rank, False)
    return None if way is None else way.module


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
    return "search" if _are_hard(out_mask, in_mask) else None


def _are_hard(*masks: Tensor | None) -> bool:
    return all(mask is None or mask.dtype == torch.bool for mask in masks)


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
    masked = optional["out_mask"] is not None or optional["in_mask"] is not None
    # As the call does, whatever the scaling: an adapter that becomes part of the weight may change the way.
    merge = None if dropout or (masked and not mask_lora) else 1.0
    operands = prepare(Operands(*tensors, **optional), merge=merge, backend=backend)
    way = way_of(operands, rank, mask_lora) if backend == "auto" and not dropout else None
    if way is not None:
        return way.name, way.why
    plain = operands.out_mask is None and operands.in_mask is None and not dropout
    choice = select("masked_lora_linear", operands.x.device, operands.x.dtype, backend, plain=plain)
    tables = ", ".join(str(table.path) for table in tables_of(operands.x.device)) if backend == "auto" else ""
    return choice.name, f"{choice.why}; nothing for this call in {tables}" if tables else choice.why


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
        found = followed("masked_lora_linear", entry.way, entry.tile, operands.x.device, operands.x.dtype)
        return None if found is None else Way(entry.way, why + found[1], found[0])
    return None
