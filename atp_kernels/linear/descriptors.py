"""Launches the kernel of tensor descriptors, and says which operands descriptors can address.

Descriptors are made on the host: they travel with the kernel's arguments, so that neither a workspace nor an allocator
for it is needed, and a CUDA graph that captures the launch holds them by value.
"""

from functools import lru_cache

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from atp_kernels.compaction.definition import round_up
from atp_kernels.linear import tiles
from atp_kernels.linear.descriptor_kernels import masked_lora_descriptor_kernel
from atp_kernels.triton_runtime import INTERPRETED, passes_int32

RELEASE = tuple(int(part) for part in triton.__version__.split(".")[:2])
_ALIGNMENT = 16  # bytes, of the first element and between rows
_SIDES = 2**31  # coordinates are signed words
_INTERPRETED_PROGRAMS = 2  # fewer than there are tiles, as on a GPU


def refuses(
    config: tiles.DescriptorConfig,
    x: Tensor,
    weight: Tensor,
    n: int,
    lora_a: Tensor | None = None,
    lora_input: Tensor | None = None,
    other: Tensor | None = None,
) -> str | None:
    """Why this tile cannot take the call of `launch` with these, for a result of n columns; None where it can."""
    if not INTERPRETED and generation(x.device) not in config.archs:
        return f"{x.device} is none of the generations {config.archs}"
    if not INTERPRETED and RELEASE < config.triton:
        return f"Triton {triton.__version__} compiles the tile to an empty kernel"
    if lora_a is not None and lora_a.shape[0] > config.one_pass_rank:
        return f"S of rank {lora_a.shape[0]} does not fit beside the tile"
    if other is not None and config.block_n > tiles.WIDEST_DOT:
        return f"the gradient of a mask does not fit beside {config.block_n} columns"
    read = {"x": x, "weight": _lines(weight)[0], "lora_a": lora_a, "lora_input": None if lora_a is None else lora_input}
    for name, matrix in read.items():
        if matrix is not None and _line_stride(matrix) is None:
            return f"no descriptor addresses {name}"
    # The results are contiguous and begin where torch's allocator puts them.
    if n * x.element_size() % _ALIGNMENT and x.shape[0] > 1:
        return f"rows of {n} results do not begin at multiples of {_ALIGNMENT} bytes"
    return None


def generation(device: torch.device) -> int | None:
    """90, 100 or 120 of a GPU with a tensor memory accelerator; None of any other device."""
    if device.type != "cuda" or torch.version.hip is not None:
        return None
    return {9: 90, 10: 100, 12: 120}.get(torch.cuda.get_device_capability(device)[0])


def launch(
    x: Tensor,
    weight: Tensor,
    lora_a: Tensor | None,
    lora_b: Tensor,
    s: Tensor | None,
    y: Tensor,
    config: tiles.DescriptorConfig,
    numerics: dict[str, object],
    *,
    scaling: float = 1.0,
    mask_lora: bool = False,
    lora_input: Tensor | None = None,
    bias: Tensor | None = None,
    out_mask: Tensor | None = None,
    in_mask: Tensor | None = None,
    total: Tensor | None = None,
    other: Tensor | None = None,
    parts: Tensor | None = None,
) -> None:
    """y = out_mask * ((in_mask * x) weight^T + bias) + s lora_b^T, with `mask_lora` masked as a whole.

    x [M, K]; weight [n, k] and bias [n]: the head of the N outputs and K inputs, or all of them; lora_a [r, K],
    lora_b [N, r], lora_input [M, K]; y, total [M, N] and s [M, r] are contiguous, masks are bytes or float32.
    With lora_a s is made on the way, of lora_input or x; else it is read, and None leaves the adapter out.
    total takes the sum before the output mask, parts [M tiles, N] the column sums of other [M, N] times that sum.
    `refuses` has taken the call.
    """
    (m, n), k, rank, one_pass = y.shape, x.shape[1], lora_b.shape[1], lora_a is not None
    block_r = tiles.rank_block(rank)
    if in_mask is not None:
        x, weight, lora_input = _masked_on_one_side(x, weight, in_mask, lora_input, mask_lora, one_pass)
    lines, by_k = _lines(weight)
    block_w = (config.block_k, config.block_n) if by_k else (config.block_n, config.block_k)
    block_y = (config.block_m, config.block_n)
    count = triton.cdiv(m, config.block_m) * triton.cdiv(n, config.block_n)
    masked_lora_descriptor_kernel[(min(count, _programs(x.device)),)](
        _described(x, config.block_m, config.block_k),
        _described(lines, *block_w),
        _described(lora_a, block_r, config.block_k),
        _described(lora_input if one_pass else None, config.block_m, config.block_k),
        _described(y, *block_y), _described(total, *block_y),
        lora_b, s, bias, out_mask, other, parts,
        m, n, k, *weight.shape, scaling,
        *lora_b.stride(), *_strides(other),
        MASK_LORA=mask_lora, ONE_PASS=one_pass, W_BY_K=by_k, WARP_SPECIALIZE=config.warp_specialize,
        WIDE=passes_int32(lora_b, s, other),
        BLOCK_M=config.block_m, BLOCK_N=config.block_n, BLOCK_K=config.block_k, GROUP_M=config.group_m,
        RANK=rank, BLOCK_R=block_r, STEP_R=tiles.descriptor_rank_step(rank, x.dtype),
        **numerics, num_warps=config.num_warps, num_stages=config.num_stages,
    )  # fmt: skip


def _masked_on_one_side(
    x: Tensor, weight: Tensor, mask: Tensor, lora_input: Tensor | None, mask_lora: bool, one_pass: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    """(x, weight, lora_input) with the mask of the inputs multiplied in, so that none lies in the loop.

    It goes to the smaller of x and weight, unless S is made of what one of them must then be.
    """
    if one_pass and lora_input is None:
        on_x = mask_lora
    else:
        on_x = x.shape[0] <= weight.shape[0]
    if one_pass and mask_lora and lora_input is not None:
        lora_input = _times(lora_input, mask)
    if on_x:
        return _times(x, mask), weight, lora_input
    lines, by_k = _lines(weight)
    lines = _times(lines, mask.unsqueeze(1) if by_k else mask)
    return x, lines.t() if by_k else lines, lora_input


def _times(matrix: Tensor, mask: Tensor) -> Tensor:
    """matrix * mask, rounded once, in lines that a descriptor addresses."""
    height, width = matrix.shape
    result = matrix.new_empty(height, round_up(width, _ALIGNMENT // matrix.element_size()))[:, :width]
    return torch.mul(matrix, mask, out=result)


def _lines(weight: Tensor) -> tuple[Tensor, bool]:
    """The weight [n, k] in contiguous lines, and whether these are its columns: then it is transposed."""
    by_k = weight.stride(1) != 1 and weight.shape[1] > 1
    return (weight.t() if by_k else weight), by_k


def _line_stride(matrix: Tensor) -> int | None:
    """Elements from line to line as a descriptor takes them; None where it cannot address the matrix."""
    (height, width), unit = matrix.shape, _ALIGNMENT // matrix.element_size()
    if not (0 < height < _SIDES and 0 < width < _SIDES) or matrix.data_ptr() % _ALIGNMENT:
        return None
    # Of an axis of one entry no step is ever taken, whatever its stride says.
    if width > 1 and matrix.stride(1) != 1:
        return None
    stride = matrix.stride(0) if height > 1 else round_up(width, unit)
    # Lines that overlap are refused by the driver.
    return stride if stride % unit == 0 and stride >= width else None


def _strides(matrix: Tensor | None) -> tuple[int, ...]:
    return (0, 0) if matrix is None else matrix.stride()


def _described(matrix: Tensor | None, height: int, width: int) -> TensorDescriptor | None:
    if matrix is None:
        return None
    return TensorDescriptor(matrix, list(matrix.shape), [_line_stride(matrix), 1], [height, width])


@lru_cache
def _programs(device: torch.device) -> int:
    """One for each multiprocessor, as the tiles fill its shared memory."""
    if INTERPRETED:
        return _INTERPRETED_PROGRAMS
    return torch.cuda.get_device_properties(device).multi_processor_count
