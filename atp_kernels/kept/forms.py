"""How a linear on a kept slice is computed, by a tuned table.

A slice in the model's order is cut out, or the whole weight with zeros. One with a side kept first has a backend, and
Triton a tile.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from atp_kernels import checks
from atp_kernels.call import autocast_dtype, override, select, shown
from atp_kernels.kept.slices import KeptSlice
from atp_kernels.tuning.table import FIRST, KEPT, ZEROED, Entry, Key, Table, tables_of
from atp_kernels.tuning.tiled import followed


def taken(kept: KeptSlice, x: Tensor, rank: int, backend: str = "auto") -> tuple[KeptSlice, Any]:
    """(the slice as it is or `KeptSlice.zeroed`, the backend that multiplies it, None where `select` decides).

    x: what the linear reads, of which shape, dtype and device count; rank: that of its adapter.
    """
    if torch.compiler.is_compiling() or not tables_of(x.device) or backend != "auto" or override():
        return kept, None  # the usual call, at the price of one look-up
    found = _entry_for(kept, x, rank)
    if found is None:
        return kept, None
    entry = found[1]
    if entry.key.regime in FIRST:
        way = followed("kept_lora_linear", entry.way, entry.tile, x.device, autocast_dtype(x) or x.dtype)
        return kept, None if way is None else way[0]
    # In a capture only what the calls before it have made already.
    zeroed = entry.way == ZEROED and (kept.holds_zeroed or not checks.is_capturing(x.device))
    return kept.zeroed if zeroed else kept, None


def explained(tensors: Sequence[Tensor], backend: str, **given: Any) -> tuple[str, str]:
    """(backend and form of a call of x, lora_a and lora_b, why) for `explain`; given: its slice as `kept`."""
    (x, lora_a, _), kept = tensors, given.pop("kept", None)
    if given or kept is None:
        raise ValueError("what a linear on a kept slice depends on beside x, lora_a and lora_b is kept: give it alone.")
    dtype = autocast_dtype(x) or x.dtype
    choice = select("kept_lora_linear", x.device, dtype, backend)
    found = None if backend != "auto" or override() else _entry_for(kept, x, lora_a.shape[0])
    if found is None:
        return choice.name, choice.why
    table, entry = found
    why = f"the fastest for {entry.key.regime} in {table.path}"
    if entry.key.regime not in FIRST:
        return f"{choice.name}, {entry.way}", f"{choice.why}; {why}"
    way = followed("kept_lora_linear", entry.way, entry.tile, x.device, dtype)
    return (choice.name, choice.why) if way is None else (entry.way, why + way[1])


def _entry_for(kept: KeptSlice, x: Tensor, rank: int) -> tuple[Table, Entry] | None:
    """The first tuned entry for this call, and its table; None for a slice that no regime is about."""
    cut = [side is not None for side in kept.sides]
    if sum(cut) != 1 or kept.quantized or x.numel() == 0:
        return None
    place = cut.index(True)
    side = kept.sides[place]
    regime = (FIRST if side is not None and side.kept_first else KEPT)[place]
    n, k = kept.out_features, kept.in_features
    key = Key(regime, shown(autocast_dtype(x) or x.dtype), x.numel() // k, n, k, rank, kept.share)
    return next(((table, entry) for table in tables_of(x.device) if (entry := table.find(key))), None)
