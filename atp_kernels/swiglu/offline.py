"""The Triton kernels of this room as `atp_kernels.offline` compiles them."""

from collections.abc import Iterator, Sequence

import torch

from atp_kernels.offline import TYPES, OfflineCase, case
from atp_kernels.swiglu import triton

_MATRICES = ("gate_ptr", "up_ptr", "h_ptr", "d_h_ptr", "d_gate_ptr", "d_up_ptr")
_MASKS = {"": None, "hard": "*u8", "soft": "*fp32"}


def cases(dtypes: Sequence[torch.dtype], ranks: Sequence[int]) -> Iterator[OfflineCase]:
    """Both directions of both activations: without a mask, with a hard one, with a soft one, and observed."""
    block_m, block_n = triton.tile_for(4096)
    for dtype in dtypes:
        for activation in triton.ACTIVATIONS:
            constants = {**triton.constants(activation), "BLOCK_M": block_m, "BLOCK_N": block_n}
            for mask, kind in _MASKS.items():
                types = {"mask_ptr": kind, "part_ptr": "*fp32" if mask == "soft" else None}
                types |= dict.fromkeys(_MATRICES, "*" + TYPES[dtype])
                name = f"{activation.removesuffix('_tanh')} {mask}".strip()
                yield case(f"{name} fwd", triton.gated_kernel, constants, types, dtype=dtype)
                yield case(f"{name} bwd", triton.gated_backward_kernel, constants, types, dtype=dtype)
            observed = {"mask_ptr": None, "part_ptr": "*fp32"} | dict.fromkeys(_MATRICES, "*" + TYPES[dtype])
            name = f"{activation.removesuffix('_tanh')} observed bwd"
            yield case(name, triton.gated_backward_kernel, constants, observed, dtype=dtype)
