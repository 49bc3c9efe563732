"""The Triton kernels of this room as `atp_kernels.offline` compiles them."""

from collections.abc import Iterator, Sequence

import torch

from atp_kernels.groups import triton, triton_kernels
from atp_kernels.offline import OfflineCase, case

_SLOTS = 4096
_TYPES = dict.fromkeys(("squares_ptr", "norms_ptr", "value_ptr", "by_ptr"), "*fp32")
_TYPES |= {"table_ptr": "*i64", "removed_ptr": "*u8", "part_ptr": "*fp64", "eps": "fp32"}
_TYPES |= dict.fromkeys(("index_ptr", "order_ptr", "starts_ptr"), "*i32")


def cases(dtypes: Sequence[torch.dtype], ranks: Sequence[int]) -> Iterator[OfflineCase]:
    """Every kernel, for slots as long as a rank; one compilation takes all dtypes."""
    for rank in ranks:
        block_s, block_l = triton.slot_tile(rank)
        walk = {"ALIGNED": True, "BLOCK_S": block_s, "BLOCK_L": block_l}
        yield case("slot squares", triton_kernels.slot_squares_kernel, walk, _TYPES, rank=rank)
        for name, prox, add in (("slope", False, False), ("add", False, True), ("shrink", True, False)):
            constants = {"PROX": prox, "ADD": add, **walk}
            yield case(f"group {name}", triton_kernels.scale_kernel, constants, _TYPES, rank=rank)
        for name, slots in (("slot norms", 1), ("joint norms", 256)):
            block_g, block_s = triton.group_tile(slots * _SLOTS, _SLOTS)
            constants = {"BLOCK_G": block_g, "BLOCK_S": block_s}
            yield case(name, triton_kernels.group_norms_kernel, constants, _TYPES, rank=rank)
        yield case("lasso total", triton_kernels.total_kernel, {"BLOCK": 1024}, _TYPES, rank=rank)
