"""A backend as a tuned entry names it: under its name, and for Triton with one tile."""

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import torch

from atp_kernels.call import select, shown, why_aside
from atp_kernels.linear.tiles import GemmConfig, descriptor_tiles
from atp_kernels.tuning.table import Tile


@dataclass(frozen=True)
class Tiled:
    """The Triton backend with one tile for all its products; called as the backend is."""

    forward: Callable[..., Any]
    backward: Callable[..., Any]
    ADDMM_CHAIN: bool = False


def named_backend(
    operation: str, name: str, tile: Tile | None, device: torch.device, dtype: torch.dtype
) -> tuple[Any, str]:
    """(the backend of an operation, in which tiles for a reader); a tile fixes that of Triton.

    Raises RuntimeError where the backend does not take the call, and for an unknown name of a tile.
    """
    module: Any = select(operation, device, dtype, name).module
    if tile is None:
        return module, ""
    if isinstance(tile, str):
        found = descriptor_tiles(dtype).get(tile)
        if found is None:
            raise RuntimeError(f"no tile of tensor descriptors in {shown(dtype)} is called {tile}.")
        config: GemmConfig = found
        said = f", in tiles {tile} of tensor descriptors"
    else:
        block_m, block_n, block_k, warps, stages = tile
        config = GemmConfig(block_m, block_n, block_k, warps, stages)
        said = f", in tiles of {block_m}x{block_n}x{block_k}, {warps} warps, {stages} stages"
    return Tiled(partial(module.forward, config=config), partial(module.backward, config=config)), said


def followed(
    operation: str, name: str, tile: Tile | None, device: torch.device, dtype: torch.dtype
) -> tuple[Any, str] | None:
    """`named_backend` of a table's entry; None where it is set aside and, with one warning, where it does not run."""
    if name != "reference" and why_aside(operation, device.type) is not None:
        return None
    return _followed(operation, name, tile, device, dtype)


@cache
def _followed(
    operation: str, name: str, tile: Tile | None, device: torch.device, dtype: torch.dtype
) -> tuple[Any, str] | None:
    try:
        return named_backend(operation, name, tile, device, dtype)
    except RuntimeError as error:
        warnings.warn(f"A tuned table is not followed: {error}", RuntimeWarning, stacklevel=2)
        return None
