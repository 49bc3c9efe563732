"""What the entries of a quantised weight are, in plain PyTorch: codes times scales."""

import torch
from torch import Tensor

NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
"""The values of the 16 codes: quantiles of a normal distribution. Source: arXiv 2305.14314, appendix E."""


def nf4(data: Tensor, scale: Tensor) -> Tensor:
    """float32 [rows, in]: data uint8 [rows, in / 2], the earlier entry in the high bits; scale float32 [rows, in / 64].

    Entry (i, j) is NF4[code(i, j)] * scale[i, j // 64].
    """
    codes = torch.stack([data >> 4, data & 15], -1).flatten(1).long()
    values = torch.tensor(NF4, device=data.device)[codes]
    return (values.unflatten(1, (scale.shape[1], -1)) * scale.unsqueeze(-1)).flatten(1)


def scaled(data: Tensor, scale: Tensor) -> Tensor:
    """float32 [rows, in]: data float8_e4m3fn or int8 [rows, in], times a scale float32 [rows, 1] or [1, 1]."""
    return data.float() * scale
