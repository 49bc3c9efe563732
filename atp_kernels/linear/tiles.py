"""Tile configurations, chosen by shape and dtype from a table: no autotuning, so every run launches the same code.

The entries are sized by `python -m atp_kernels.offline` (registers, shared memory, spills); a caller who has measured
better ones passes `config=`, or names one of `descriptor_tiles` in the environment variable of `TILE_VARIABLE`.
"""

import os
from dataclasses import dataclass, replace

import torch

SMALLEST_DOT = 16
LARGEST_RANK = 128
"""A wider rank tile no longer fits beside the GEMM's own tiles."""


WIDEST_DOT = 128
"""With more columns the gradient of a mask, which reads one more operand, does not fit into registers."""


@dataclass(frozen=True)
class GemmConfig:
    """Tile of `masked_lora_gemm_kernel`; `one_pass` recomputes S in every tile instead of reading it."""

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int
    one_pass: bool = False
    group_m: int = 8


@dataclass(frozen=True)
class DescriptorConfig(GemmConfig):
    """Tile of `masked_lora_descriptor_kernel`; `warp_specialize` gives loads and products warps of their own.

    archs: the generations of GPUs that it fits (90, 100, 120). one_pass_rank: up to which rank it can be `one_pass`.
    triton: the oldest release that it was seen to compile with.
    """

    warp_specialize: bool = False
    archs: tuple[int, ...] = (90, 100)
    one_pass_rank: int = LARGEST_RANK
    triton: tuple[int, int] = (0, 0)


@dataclass(frozen=True)
class ReduceConfig:
    """Tile of the tall, thin kernels: `block_long` along the reduced side, `block_wide` along the kept one."""

    block_wide: int
    block_long: int
    num_warps: int = 4
    num_stages: int = 3


# Largest M a tile is for, and the tile; one row ends each list with no limit.
_HALF = (
    (16, (16, 64, 128, 4, 4)),
    (128, (64, 64, 64, 4, 4)),
    (1024, (64, 128, 64, 4, 4)),
    (None, (128, 128, 64, 8, 3)),
)
_SINGLE = (
    (16, (16, 64, 64, 4, 3)),
    (None, (64, 64, 32, 8, 3)),
)
_TRIED_HALF = (
    (64, 64, 64, 4, 4),
    (64, 128, 64, 4, 4),
    (128, 64, 64, 4, 4),
    (128, 128, 64, 8, 3),
    (128, 128, 32, 8, 4),
    (64, 256, 32, 8, 3),
)
_TRIED_SINGLE = ((64, 64, 32, 8, 3), (64, 64, 32, 4, 3), (32, 64, 32, 4, 3), (64, 32, 32, 4, 3))
# Its loop also stages A and a separate lora_input: a smaller step keeps all of it under 99 KB.
_ONE_PASS = {True: (64, 64, 32, 8, 2), False: (64, 128, 32, 4, 4)}
_FEW_WARPS_RANK = 32  # beyond it the second sum of the one pass takes all registers of four warps
TILE_VARIABLE = "ATP_KERNELS_LINEAR_TILE"
"""Its value is the name of a tile in `descriptor_tiles`; unset or empty, every call takes the table's."""

# No tile here has run on a GPU yet, so that none is a default.
_DESCRIPTOR_HALF = {
    "128x256x64": DescriptorConfig(128, 256, 64, 8, 3, archs=(90,)),
    "128x256x64-one-pass": DescriptorConfig(128, 256, 64, 8, 3, one_pass=True, archs=(90,), one_pass_rank=16),
    # On 100 the 256 columns of its accumulator leave no room for that of S, nor registers for the epilogue of 8 warps.
    # Triton 3.6 takes more tensor memory for it than there is, and leaves an empty kernel behind.
    "128x256x64-warps": DescriptorConfig(128, 256, 64, 8, 3, warp_specialize=True, archs=(100,), triton=(3, 9)),
    "128x128x64": DescriptorConfig(128, 128, 64, 8, 4),
    "128x128x64-warps": DescriptorConfig(128, 128, 64, 8, 4, warp_specialize=True, archs=(100,)),
    "128x128x64-one-pass": DescriptorConfig(128, 128, 64, 8, 3, one_pass=True),
    "64x128x64": DescriptorConfig(64, 128, 64, 4, 4),
    "128x128x64-99k": DescriptorConfig(128, 128, 64, 8, 2, archs=(120,)),
    "64x128x64-99k-one-pass": DescriptorConfig(64, 128, 64, 4, 2, one_pass=True, archs=(120,)),
}
_DESCRIPTOR_SINGLE = {"64x64x32": DescriptorConfig(64, 64, 32, 8, 3, archs=(90, 100, 120))}
# One or two tiles across the output recompute S for less than a second pass over x costs.
_ONE_PASS_TILES = 2
# Two programs for each multiprocessor of the largest current GPUs; a constant, so that sums never depend on the device.
_PROGRAMS = 264
# Beyond it tiles are smaller: sm_80 would spill registers, and sm_120 has too little shared memory for 64 rows.
_WIDE_RANK = 64


def gemm_config(m: int, n: int, rank: int, dtype: torch.dtype) -> GemmConfig:
    """The tile for an [m, n] result with an adapter of this rank."""
    single = dtype == torch.float32
    one_pass = _ONE_PASS[single]
    if n <= _ONE_PASS_TILES * one_pass[1] and rank_block(rank) == rank_step(rank, dtype):
        config = GemmConfig(*one_pass, one_pass=True)
        return config if rank <= _FEW_WARPS_RANK else replace(config, num_warps=8)
    return GemmConfig(*next(tile for limit, tile in (_SINGLE if single else _HALF) if limit is None or m <= limit))


def descriptor_tiles(dtype: torch.dtype, arch: int | None = None) -> dict[str, DescriptorConfig]:
    """The tiles of `masked_lora_descriptor_kernel` by name: all for this dtype, or those that fit one generation."""
    table = _DESCRIPTOR_SINGLE if dtype == torch.float32 else _DESCRIPTOR_HALF
    return {name: tile for name, tile in table.items() if arch is None or arch in tile.archs}


def named_tile(dtype: torch.dtype) -> DescriptorConfig | None:
    """The tile that the environment names; None where it names none, or one of the other dtypes.

    Raises ValueError for an unknown name.
    """
    name = os.environ.get(TILE_VARIABLE)
    if not name:
        return None
    known = _DESCRIPTOR_HALF | _DESCRIPTOR_SINGLE
    if name not in known:
        raise ValueError(f"{TILE_VARIABLE} is {name}: name one of {', '.join(known)}, or unset it.")
    return descriptor_tiles(dtype).get(name)


def gemm_tiles(dtype: torch.dtype) -> tuple[tuple[int, int, int, int, int], ...]:
    """BLOCK_M, BLOCK_N, BLOCK_K, warps and stages of the tiles of `masked_lora_gemm_kernel` that the tuner tries.

    128x256x64 is none of them: its dx spills on 90, 120 and gfx942. The kernel of descriptors has one.
    """
    return _TRIED_SINGLE if dtype == torch.float32 else _TRIED_HALF


def down_config(m: int, rank: int, dtype: torch.dtype) -> ReduceConfig:
    """The tile for S = x A^T: rows of x are few programs, so they are kept narrow until there are enough of them."""
    many = m >= 64 * _PROGRAMS and rank <= _WIDE_RANK
    wide = 16 if m <= 16 else 64 if many else 32
    if dtype == torch.float32:
        return ReduceConfig(wide, 64 if rank <= _WIDE_RANK else 32, 8)
    return ReduceConfig(wide, 128)


def reduce_config(rank: int, dtype: torch.dtype) -> ReduceConfig:
    """The tile for reductions over rows, which make a factor of this rank."""
    if dtype == torch.float32:
        return ReduceConfig(64, 32 if rank <= _WIDE_RANK else 16, 8)
    return ReduceConfig(64, 64)


def row_splits(m: int, c: int, config: ReduceConfig) -> int:
    """Into how many parts the rows are split so that c columns still fill the GPU."""
    columns = -(-c // config.block_wide)
    return max(1, min(_PROGRAMS // columns, -(-m // (4 * config.block_long))))


def rank_block(rank: int) -> int:
    """The rank padded to a power of two that tl.dot takes."""
    return max(SMALLEST_DOT, 1 << (rank - 1).bit_length())


def rank_step(rank: int, dtype: torch.dtype) -> int:
    """How much of the rank the GEMM's epilogue takes at a time."""
    return SMALLEST_DOT if dtype == torch.float32 else rank_block(rank)


def descriptor_rank_step(rank: int, dtype: torch.dtype) -> int:
    """As `rank_step`, beside an accumulator of up to 256 columns."""
    return min(16 if rank > 64 else 32, rank_step(rank, dtype))
