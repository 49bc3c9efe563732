"""The Triton kernels of this room as `atp_kernels.offline` compiles them."""

from collections.abc import Iterator, Sequence

import torch

from atp_kernels.norm import triton
from atp_kernels.offline import TYPES, OfflineCase, case

_WIDTHS = {" narrow": 576, "": 4096, " wide": 16384}
_TYPES: dict[str, str | None] = {
    **dict.fromkeys(("weight_ptr", "scale_ptr", "part_ptr"), "*fp32"), **dict.fromkeys(("eps", "multiplier"), "fp32"),
}  # fmt: skip
_SUM = ("output_ptr", "stream_ptr", "d_stream_ptr", "d_output_ptr")
"""What the kernels read and write beside the norm where an addition precedes it."""


def cases(dtypes: Sequence[torch.dtype], ranks: Sequence[int]) -> Iterator[OfflineCase]:
    """Both directions for rows of three widths, the last too wide for a tile, alone and after an addition of a block's
    output to a float32 stream, and the weight's gradient."""
    for dtype in dtypes:
        types = _TYPES | dict.fromkeys(("x_ptr", "y_ptr", "d_y_ptr", "d_x_ptr"), "*" + TYPES[dtype])
        types |= dict.fromkeys(_SUM)
        without = types | {"part_ptr": None}
        output = dict.fromkeys(("output_ptr", "y_ptr", "d_y_ptr", "d_output_ptr"), "*" + TYPES[dtype])
        added = without | output | dict.fromkeys(("x_ptr", "stream_ptr", "d_stream_ptr", "d_x_ptr"), "*fp32")
        for name, width in _WIDTHS.items():
            (block_m, block_k, warps), kernel = triton.tile_for(width), triton.rms_norm_backward_kernel
            constants = {"WHOLE": width <= block_k, "BLOCK_M": block_m, "BLOCK_K": block_k}
            yield case(f"norm fwd{name}", triton.rms_norm_kernel, constants, types, dtype=dtype, num_warps=warps)
            yield case(f"norm dx{name}", kernel, constants, without, dtype=dtype, num_warps=warps)
            yield case(f"add norm fwd{name}", triton.rms_norm_kernel, constants, added, dtype=dtype, num_warps=warps)
            yield case(f"add norm dx{name}", kernel, constants, added, dtype=dtype, num_warps=warps)
            if width <= block_k:
                yield case(f"norm dx dw{name}", kernel, constants, types, dtype=dtype, num_warps=warps)
        block_m, block_k = triton._COLUMN_TILE
        yield case("norm dw", triton.weight_grad_kernel, {"BLOCK_M": block_m, "BLOCK_K": block_k}, types, dtype=dtype)
