"""Which form of a kept slice a call multiplies, by a tuned table: what is cut out, or the whole weight with zeros."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from atp_kernels import checks
from atp_kernels.call import autocast_dtype, override, select, shown
from atp_kernels.kept.slices import KeptSlice
from atp_kernels.tuning.table import KEPT, SLICED, Entry, Key, Table, tables_of


def form_of(kept: KeptSlice, x: Tensor, rank: int, backend: str = "auto") -> KeptSlice:
    """The slice as it is, or `KeptSlice.zeroed`; x: what the linear reads, rank: that of its adapter."""
    if torch.compiler.is_compiling() or not tables_of(x.device) or backend != "auto" or override():
        return kept  # the usual call, at the price of one look-up
    if checks.is_capturing(x.device):
        return kept  # whose weight was made before
    found = _entry_for(kept, x, rank)
    return kept if found is None or found[1].way == SLICED else kept.zeroed


def explained(tensors: Sequence[Tensor], backend: str, **given: Any) -> tuple[str, str]:
    """(backend and form of a call of x, lora_a and lora_b, why) for `explain`; given: its slice as `kept`."""
    (x, lora_a, _), kept = tensors, given.pop("kept", None)
    if given or kept is None:
        raise ValueError("what a linear on a kept slice depends on beside x, lora_a and lora_b is kept: give it alone.")
    choice = select("kept_lora_linear", x.device, autocast_dtype(x) or x.dtype, backend)
    found = None if backend != "auto" or override() else _entry_for(kept, x, lora_a.shape[0])
    if found is None:
        return choice.name, choice.why
    table, entry = found
    return f"{choice.name}, {entry.way}", f"{choice.why}; the fastest for {entry.key.regime} in {table.path}"


def _entry_for(kept: KeptSlice, x: Tensor, rank: int) -> tuple[Table, Entry] | None:
    """The first tuned entry for this call, and its table; None for a slice that no regime is about."""
    in_order = [side is not None and not side.kept_first for side in kept.sides]
    other = [side is not None and side.kept_first for side in kept.sides]
    if sum(in_order) != 1 or any(other) or kept.quantized or x.numel() == 0:
        return None
    n, k = kept.out_features, kept.in_features
    regime = KEPT[in_order.index(True)]
    key = Key(regime, shown(autocast_dtype(x) or x.dtype), x.numel() // k, n, k, rank, kept.share)
    return next(((table, entry) for table in tables_of(x.device) if (entry := table.find(key))), None)
