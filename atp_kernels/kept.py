"""The LoRA step while searching: hard masks on the base path at the cost of the kept slice of the base weight.

With R, C the kept outputs and inputs (`KeptSlice` gathers W_k = W[R, C] once a decision) and spread the inverse of a
gather, zero at removed positions: y = spread_R(x[:, C] W_k^T + bias[R]) + S B^T, S = scaling * lora_input A^T, and with
G = dL/dy, P = scaling * G B: dx = spread_C(G[:, R] W_k), dB = G^T S, dA = P^T lora_input, d lora_input = P A (added to
dx where LoRA reads x). Where a side lies kept first, spread and gather are plain slices of columns.
"""

import torch
from torch import Tensor

from atp_kernels import ops
from atp_kernels.slices import KeptSlice


def kept_lora_linear(
    x: Tensor,
    kept: KeptSlice,
    lora_a: Tensor,
    lora_b: Tensor,
    *,
    scaling: float,
    lora_input: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """`masked_lora_linear` with the hard masks of a `KeptSlice` on the base path, at the cost of the kept slice.

    x [..., in]; lora_a [r, in]; lora_b [out, r]; lora_input like x (x after dropout; default x). Returns [..., out] in
    the dtype of x, which is the weight's; the factors and lora_input are cast to it. Under autocast all are cast to the
    autocast dtype. Where a mask of the slice is a `KeptFirst`, x and lora_input, or the result, lie in its order; the
    factors and their gradients never do. Differentiable once in x, lora_a, lora_b and lora_input, deterministic, and
    S [M, r] and what LoRA reads are all that is saved. Under torch.compile the slice must hold its weight already.
    Raises ValueError for wrong shapes, dtypes or devices, RuntimeError for a named backend that cannot take the call.
    Source: arXiv 2412.14426, section 3 (LoRA step).
    """
    return ops.kept_linear(*prepare(x, kept, lora_a, lora_b, lora_input), float(scaling), backend)


def prepare(
    x: Tensor, kept: KeptSlice, lora_a: Tensor, lora_b: Tensor, lora_input: Tensor | None
) -> tuple[Tensor, KeptSlice, Tensor, Tensor, Tensor | None]:
    """Check the operands and cast them as autocast and the dtype rules ask."""
    _check_call(x, kept, lora_a, lora_b, lora_input)
    dtype = x.dtype
    if torch.is_autocast_enabled(x.device.type) and dtype != torch.float64:
        dtype = torch.get_autocast_dtype(x.device.type)
    elif kept.dtype != dtype:
        raise ValueError(f"the slice is {kept.dtype} and x is {dtype}: cast one of them, or use autocast.")
    lora_input = None if lora_input is None or lora_input is x else lora_input.to(dtype)
    return x.to(dtype), kept, lora_a.to(dtype), lora_b.to(dtype), lora_input


def _check_call(x: Tensor, kept: KeptSlice, lora_a: Tensor, lora_b: Tensor, lora_input: Tensor | None) -> None:
    n_out, n_in = kept.out_features, kept.in_features
    if x.ndim == 0 or x.shape[-1] != n_in:
        raise ValueError(f"x has shape {list(x.shape)}, but the weight [{n_out}, {n_in}] needs [..., {n_in}].")
    if lora_a.ndim != 2:
        raise ValueError(f"lora_a has shape {list(lora_a.shape)}, but the weight needs [r, {n_in}].")
    rank = lora_a.shape[0]
    expected = (
        ("x", x, x.shape),
        ("lora_a", lora_a, (rank, n_in)),
        ("lora_b", lora_b, (n_out, rank)),
        ("lora_input", lora_input, x.shape),
    )
    for name, tensor, shape in expected:
        if tensor is None:
            continue
        if tensor.shape != shape:
            raise ValueError(f"{name} has shape {list(tensor.shape)}, but the weight and x need {list(shape)}.")
        if tensor.device != kept.device:
            raise ValueError(f"{name} is on {tensor.device} and the slice on {kept.device}: move them to one device.")
        if not tensor.is_floating_point():
            raise ValueError(f"{name} is {tensor.dtype}: give a floating tensor.")
