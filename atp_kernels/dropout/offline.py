"""The Triton kernel of this room as `atp_kernels.offline` compiles it."""

from collections.abc import Iterator, Sequence

import torch

from atp_kernels.dropout import triton
from atp_kernels.offline import TYPES, OfflineCase, case


def cases(dtypes: Sequence[torch.dtype], ranks: Sequence[int]) -> Iterator[OfflineCase]:
    """One kernel for each dtype, with a seed from the host and with one on the device."""
    sizes = {"WIDE": False, "BLOCK_M": triton.BLOCK_M, "BLOCK_K": triton.BLOCK_K, "stride_xk": 1}
    constants = {"THRESHOLD": 2**32 // 10, "SCALE": 1 / 0.9, **sizes}
    for dtype in dtypes:
        for name, kind in (("dropout", None), ("dropout, device seed", "*i64")):
            types = {"seed": "i64", "seed_ptr": kind} | dict.fromkeys(("x_ptr", "y_ptr"), "*" + TYPES[dtype])
            yield case(name, triton.dropout_kernel, constants, types, dtype=dtype, num_warps=triton.NUM_WARPS)
