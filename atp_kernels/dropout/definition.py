"""Dropout by position and seed, in plain PyTorch: the definition every backend is held to, to the last bit."""

from typing import NamedTuple

import torch
from torch import Tensor

PHILOX_ROUNDS = 7
"""The fewest that pass Crush (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3", table 2)."""

_UINT32 = 0xFFFFFFFF


class Dropout(NamedTuple):
    """Drops an element of a matrix [M, K] with probability p in [0, 1), by its position and a 64-bit seed alone."""

    p: float
    seed: int | Tensor
    """On the host, or a 0-d int64 tensor on the device of the matrix, which only the kernels read."""

    @property
    def threshold(self) -> int:
        """An element is kept when its random 32-bit word is at least this."""
        return int(self.p * 2**32)

    @property
    def scale(self) -> float:
        """What kept elements are multiplied by, before they are rounded to their dtype."""
        return 1 / (1 - self.p)

    @property
    def key(self) -> tuple[int | Tensor, int | Tensor]:
        """The seed's low and high 32 bits."""
        return self.seed & _UINT32, self.seed >> 32 & _UINT32


def dropped(values: Tensor, dropout: Dropout, first_row: int = 0) -> Tensor:
    """keep * values / (1 - p) for values [M, K], the rows from `first_row` on of a larger matrix.

    Element (m, k) is kept where word k % 4 of Philox-4x32-7 with counter (m, k // 4, 0, 0) is at least floor(p * 2^32).
    """
    rows, cols = values.shape
    m = torch.arange(first_row, first_row + rows, device=values.device).unsqueeze(1)
    quads = torch.arange(-(-cols // 4), device=values.device)
    zero = torch.zeros((), dtype=torch.int64, device=values.device)
    words = torch.stack(torch.broadcast_tensors(*philox((m, quads, zero, zero), dropout.key)), dim=2)
    keep = words.view(rows, 4 * quads.numel())[:, :cols] >= dropout.threshold
    return torch.where(keep, values * dropout.scale, 0)


def philox(
    counter: tuple[Tensor, Tensor, Tensor, Tensor],
    key: tuple[int | Tensor, int | Tensor],
    rounds: int = PHILOX_ROUNDS,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The four 32-bit words of Philox-4x32 for each counter, all as int64 (Salmon et al. 2011, section 3.3)."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(rounds):
        # int64 products wrap, which leaves all 64 bits of the unsigned product in place.
        left, right = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0, c1 = (right >> 32 & _UINT32) ^ c1 ^ k0, right & _UINT32
        c2, c3 = (left >> 32 & _UINT32) ^ c3 ^ k1, left & _UINT32
        k0, k1 = k0 + 0x9E3779B9 & _UINT32, k1 + 0xBB67AE85 & _UINT32
    return c0, c1, c2, c3
