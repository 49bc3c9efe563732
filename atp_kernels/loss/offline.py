"""The Triton kernel of this room as `atp_kernels.offline` compiles it."""

from collections.abc import Iterator, Sequence

import torch

from atp_kernels.loss import triton
from atp_kernels.offline import TYPES, OfflineCase, case


def cases(dtypes: Sequence[torch.dtype], ranks: Sequence[int]) -> Iterator[OfflineCase]:
    """A vocabulary of many blocks, and one that a block holds."""
    for dtype in dtypes:
        types = {"logits_ptr": "*" + TYPES[dtype], "target_ptr": "*i64", "loss_ptr": "*fp32"}
        for name, block in (("", triton._WIDEST_BLOCK), (" narrow", 512)):
            warps = triton.warps_for(block)
            yield case(
                f"loss{name}", triton.cross_entropy_kernel, {"BLOCK": block}, types, dtype=dtype, num_warps=warps
            )
