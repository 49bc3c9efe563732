"""Rotary position embedding."""

import torch
from torch import Tensor

from atp_kernels.checks import check_range
from atp_kernels.kinds import typed
from atp_kernels.rotary import op


@typed
def rotary_embedding(
    q: Tensor,
    k: Tensor,
    cos: Tensor,
    sin: Tensor,
    *,
    index: Tensor | None = None,
    width: int | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """x * cos + rotate_half(x) * sin of queries and keys, in float32 or better and rounded once, heads before tokens.

    q [batch, tokens, heads, D] and k [batch, tokens, kv_heads, D] of one dtype, any strides, D even. cos, sin [batch or
    1, tokens, A], floating, without gradient. index: int64 [D], the position in A of each dimension's angle where RoPE
    pairs are removed; None where A is D. width: of the results' heads, at least D (the default); zeros fill the rest.
    Returns q [batch, heads, tokens, width] and k [batch, kv_heads, tokens, width] in their dtype. Differentiable once
    in q and k; the gradients are contiguous as [batch, tokens, heads * D]. An index on the CPU is checked for its
    range, one on another device is taken at its word, as looking would wait for the device. Raises ValueError for wrong
    shapes, dtypes or devices, RuntimeError for a named backend that cannot take the call. Source: Su et al. 2021.

    >>> q, k = torch.ones(1, 3, 4, 2), torch.ones(1, 3, 1, 2)  # four heads of queries, one of keys
    >>> turned, _ = rotary_embedding(q, k, cos=torch.zeros(1, 3, 2), sin=torch.ones(1, 3, 2))
    >>> turned.shape, turned[0, 0, 0]
    (torch.Size([1, 4, 3, 2]), tensor([-1.,  1.]))
    """
    if q.ndim != 4 or k.ndim != 4 or q.shape[:2] != k.shape[:2] or q.shape[3] != k.shape[3] or q.shape[3] % 2:
        shapes = f"{list(q.shape)} and {list(k.shape)}"
        raise ValueError(f"q and k have shapes {shapes}: give [batch, tokens, heads, D] with one even D.")
    if q.dtype != k.dtype or not q.is_floating_point():
        raise ValueError(f"q is {q.dtype} and k is {k.dtype}: give one floating dtype.")
    batch, tokens, _, size = q.shape
    for name, angles in (("cos", cos), ("sin", sin)):
        right = angles.ndim == 3 and angles.shape[0] in (1, batch) and angles.shape[1] == tokens
        if not right or angles.shape != cos.shape or (index is None and angles.shape[2] != size):
            needs = f"[{batch} or 1, {tokens}, {'A' if index is not None else size}]"
            raise ValueError(f"{name} has shape {list(angles.shape)}, but q {list(q.shape)} needs {needs}.")
        if not angles.is_floating_point() or angles.element_size() < 2 or angles.requires_grad:
            raise ValueError(f"{name} must be floating and constant: detach it, or cast it.")
    if index is not None and (index.shape != (size,) or index.dtype != torch.int64):
        raise ValueError(f"index is {index.dtype} of shape {list(index.shape)}: give int64 [{size}].")
    for name, tensor in (("k", k), ("cos", cos), ("sin", sin), ("index", index)):
        if tensor is not None and tensor.device != q.device:
            raise ValueError(f"{name} is on {tensor.device} and q on {q.device}: move them to one device.")
    if index is not None and index.device.type == "cpu":
        check_range("index holds positions from", index, cos.shape[2], "position")
    width = size if width is None else width
    if not size <= width < 2**31:
        raise ValueError(f"width is {width}, but the heads have {size} dimensions: give at least as many, below 2^31.")
    return op.rotary_embedding(q, k, cos, sin, index, width, backend)
