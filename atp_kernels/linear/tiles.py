"""Tile configurations, chosen by shape and dtype from a table: no autotuning, so every run launches the same code.

The entries are sized by `python -m atp_kernels.offline` (registers, shared memory, spills); a caller who has measured
better ones passes `config=`.
"""

from dataclasses import dataclass

import torch

SMALLEST_DOT = 16
LARGEST_RANK = 128
"""A wider rank tile no longer fits beside the GEMM's own tiles."""


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
# Its loop also stages A and a separate lora_input: a smaller step keeps all of it under 99 KB.
_ONE_PASS = {True: (64, 64, 32, 8, 2), False: (64, 128, 32, 4, 4)}
# One or two tiles across the output recompute S for less than a second pass over x costs.
_ONE_PASS_TILES = 2
# Two programs for each multiprocessor of the largest current GPUs; a constant, so that sums never depend on the device.
_PROGRAMS = 264


def gemm_config(m: int, n: int, rank: int, dtype: torch.dtype) -> GemmConfig:
    """The tile for an [m, n] result with an adapter of this rank."""
    single = dtype == torch.float32
    one_pass = _ONE_PASS[single]
    if n <= _ONE_PASS_TILES * one_pass[1] and rank_block(rank) == rank_step(rank, dtype):
        return GemmConfig(*one_pass, one_pass=True)
    return GemmConfig(*next(tile for limit, tile in (_SINGLE if single else _HALF) if limit is None or m <= limit))


def down_config(m: int, dtype: torch.dtype) -> ReduceConfig:
    """The tile for S = x A^T: rows of x are few programs, so they are kept narrow until there are enough of them."""
    long, warps = (64, 8) if dtype == torch.float32 else (128, 4)
    return ReduceConfig(16 if m <= 16 else 64 if m >= 64 * _PROGRAMS else 32, long, warps)


def reduce_config(dtype: torch.dtype) -> ReduceConfig:
    """The tile for reductions over rows."""
    return ReduceConfig(64, 32, 8) if dtype == torch.float32 else ReduceConfig(64, 64)


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
