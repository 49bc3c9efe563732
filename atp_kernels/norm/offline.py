"""The Triton kernels of this room as `atp_kernels.offline` compiles them."""

from collections.abc import Iterator, Sequence

import torch

from atp_kernels.norm import triton
from atp_kernels.offline import TYPES, Case, case

_WIDTHS = {"narrow": 576, "": 4096, "wide": 16384}
_TYPES = {"weight_ptr": "*fp32", "scale_ptr": "*fp32", "part_ptr": "*fp32", "eps": "fp32"}


def cases(dtypes: Sequence[torch.dtype], ranks: Sequence[int]) -> Iterator[Case]:
    """Both directions for rows of three widths, the last too wide for a tile, and the weight's gradient."""
    for dtype in dtypes:
        types = _TYPES | dict.fromkeys(("x_ptr", "y_ptr", "d_y_ptr", "d_x_ptr"), "*" + TYPES[dtype])
        for name, width in _WIDTHS.items():
            tile = triton.tile_for(width)
            whole = width <= tile.block_k
            constants = {"WHOLE": whole, "BLOCK_M": tile.block_m, "BLOCK_K": tile.block_k}
            options = {"dtype": dtype, "num_warps": tile.num_warps}
            yield case(f"norm fwd {name}".strip(), triton.rms_norm_kernel, constants, types, **options)
            without = types | {"part_ptr": None}
            yield case(f"norm dx {name}".strip(), triton.rms_norm_backward_kernel, constants, without, **options)
            if whole:
                yield case(f"norm dx dw {name}".strip(), triton.rms_norm_backward_kernel, constants, types, **options)
        block_m, block_k = triton._COLUMN_TILE
        constants = {"BLOCK_M": block_m, "BLOCK_K": block_k}
        yield case("norm dw", triton.weight_grad_kernel, constants, types, dtype=dtype)
