"""The Triton kernel of this room as `atp_kernels.offline` compiles it."""

from collections.abc import Iterator, Sequence

import torch

from atp_kernels.offline import TYPES, OfflineCase, case
from atp_kernels.rotary import triton

_STRIDES = [name for name in triton.rotary_kernel.arg_names if name[-2:] in ("_b", "_t", "_h")]


def cases(dtypes: Sequence[torch.dtype], ranks: Sequence[int]) -> Iterator[OfflineCase]:
    """Both directions for heads of 128, and heads without some pairs, padded, with offsets beyond int32."""
    for dtype in dtypes:
        types = dict.fromkeys(("q_ptr", "k_ptr", "q_out_ptr", "k_out_ptr", "cos_ptr", "sin_ptr"), "*" + TYPES[dtype])
        for name, half, beyond in (("", 64, 0), (" pairs", 38, 4)):
            block_t, block_d = triton.tile_for(half)
            constants = {"HEADS": triton._HEADS, "BLOCK_T": block_t, "BLOCK_D": block_d, "BLOCK_ZERO": beyond}
            own: dict[str, str | None] = {"index_ptr": "*i64" if beyond else None}
            own |= dict.fromkeys(_STRIDES, "i64") if beyond else {}
            for way, inverse in (("fwd", False), ("bwd", True)):
                yield case(
                    f"rotary {way}{name}",
                    triton.rotary_kernel,
                    constants | {"INVERSE": inverse},
                    types | own,
                    dtype=dtype,
                )
