"""The Triton kernels of this room as `atp_kernels.offline` compiles them."""

from collections.abc import Iterator, Sequence

import torch

from atp_kernels.norm import triton
from atp_kernels.offline import TYPES, OfflineCase, case

_WIDTHS = {" narrow": 576, "": 4096, " wide": 16384}
_TYPES: dict[str, str | None] = {"weight_ptr": "*fp32", "scale_ptr": "*fp32", "part_ptr": "*fp32", "eps": "fp32"}


def cases(dtypes: Sequence[torch.dtype], ranks: Sequence[int]) -> Iterator[OfflineCase]:
    """Both directions for rows of three widths, the last too wide for a tile, and the weight's gradient."""
    for dtype in dtypes:
        types = _TYPES | dict.fromkeys(("x_ptr", "y_ptr", "d_y_ptr", "d_x_ptr"), "*" + TYPES[dtype])
        without = types | {"part_ptr": None}
        for name, width in _WIDTHS.items():
            (block_m, block_k, warps), kernel = triton.tile_for(width), triton.rms_norm_backward_kernel
            constants = {"WHOLE": width <= block_k, "BLOCK_M": block_m, "BLOCK_K": block_k}
            yield case(f"norm fwd{name}", triton.rms_norm_kernel, constants, types, dtype=dtype, num_warps=warps)
            yield case(f"norm dx{name}", kernel, constants, without, dtype=dtype, num_warps=warps)
            if width <= block_k:
                yield case(f"norm dx dw{name}", kernel, constants, types, dtype=dtype, num_warps=warps)
        block_m, block_k = triton._COLUMN_TILE
        yield case("norm dw", triton.weight_grad_kernel, {"BLOCK_M": block_m, "BLOCK_K": block_k}, types, dtype=dtype)
