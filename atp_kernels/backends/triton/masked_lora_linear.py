"""Launching the masked LoRA linear: which kernels a call needs, with which tiles.

Where a piece has nothing to fuse, the vendor GEMM takes it: a call without masks (Triton reaches about 0.87 of cuBLAS
on H100, which costs more than an `addmm_` of the adapter), dW, whose masks scale rows and columns of the result, and
the gradient of a separate lora_input, which is all memory traffic. Dropout then has a kernel of its own.
"""

from collections.abc import Sequence

import torch
import triton
from torch import Tensor

from atp_kernels.backends import aten
from atp_kernels.backends.primitives import Primitives, mask_
from atp_kernels.backends.triton import kernels, tiles
from atp_kernels.reference import Dropout
from atp_kernels.triton_runtime import INTERPRETED

_INT32_LIMIT = 2**31
_LARGEST_STRIDE = 2**23
"""Tiles reach over 128 of either side at most: what these strides add up to within one stays below 2**31."""


def masked_lora_linear_forward(
    x: Tensor,
    weight: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    bias: Tensor | None,
    lora_input: Tensor | None,
    out_mask: Tensor | None,
    in_mask: Tensor | None,
    scaling: float,
    mask_lora: bool,
    keep_sum: bool,
    with_norms: bool,
    dropout: Dropout | None = None,
    *,
    config: tiles.GemmConfig | None = None,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """As `reference.masked_lora_linear_forward`; a `config` forces the kernels and their tile."""
    if config is None and not _fusion_pays(x, weight, lora_a, out_mask, in_mask):
        return aten.masked_lora_linear_forward(
            x, weight, lora_a, lora_b, bias, lora_input, out_mask, in_mask,
            scaling, mask_lora, keep_sum, with_norms, dropout, primitives=_PRIMITIVES,
        )  # fmt: skip
    tensors = (x, weight, lora_a, lora_b, bias, lora_input, out_mask, in_mask)
    x, weight, lora_a, lora_b, bias, lora_input, out_mask, in_mask = map(_readable, tensors)
    (m, k), n, rank = x.shape, weight.shape[0], lora_a.shape[0]
    config = config or tiles.gemm_config(m, n, rank, x.dtype)
    # With the random words on top, recomputing S takes more registers than there are.
    one_pass = config.one_pass and dropout is None
    y = x.new_empty(m, n)
    down = x.new_empty(m, rank)
    total = x.new_empty(m, n) if keep_sum else None
    b_sq = x.new_empty(n, dtype=torch.float32) if with_norms else None
    a_sq = x.new_empty(k, dtype=torch.float32) if with_norms else None
    with torch.cuda.device_of(x):
        if not one_pass:
            adapter_input = x if lora_input is None else lora_input
            _down(adapter_input, lora_a, in_mask if mask_lora else None, scaling, down, a_sq, dropout)
        _gemm(
            x, weight, lora_b, down, out_mask, in_mask, y, config, mask_lora=mask_lora, scaling=scaling,
            lora_a=lora_a if one_pass else None, lora_input=lora_input if one_pass else None,
            bias=bias, total=total, b_sq=b_sq, a_sq=a_sq if one_pass else None,
        )  # fmt: skip
    return y, down, total, b_sq, a_sq


def masked_lora_linear_backward(
    grad_y: Tensor,
    x: Tensor | None,
    weight: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    lora_input: Tensor | None,
    out_mask: Tensor | None,
    in_mask: Tensor | None,
    down: Tensor | None,
    total: Tensor | None,
    scaling: float,
    mask_lora: bool,
    shared_input: bool,
    needs: Sequence[bool],
    dropout: Dropout | None = None,
    *,
    config: tiles.GemmConfig | None = None,
) -> tuple[Tensor | None, ...]:
    """As `reference.masked_lora_linear_backward`; a `config` forces the kernels and the tile of dx."""
    if config is None and not _fusion_pays(grad_y, weight, lora_a, out_mask, in_mask):
        return aten.masked_lora_linear_backward(
            grad_y, x, weight, lora_a, lora_b, lora_input, out_mask, in_mask, down, total,
            scaling, mask_lora, shared_input, needs, dropout, primitives=_PRIMITIVES,
        )  # fmt: skip
    tensors = (grad_y, x, weight, lora_a, lora_b, lora_input, out_mask, in_mask, total)
    grad_y, x, weight, lora_a, lora_b, lora_input, out_mask, in_mask, total = map(_readable, tensors)
    need_x, need_w, need_a, need_b, need_bias, need_adapter, need_out, need_in = needs
    need_adapter = need_adapter or (shared_input and need_x) or (mask_lora and need_in)
    lora_out_mask = out_mask if mask_lora else None
    lora_in_mask = in_mask if mask_lora else None
    up = d_x = d_in = d_a = d_weight = d_adapter = None
    with torch.cuda.device_of(grad_y):
        d_b, d_out, d_bias = _reduce_rows(
            grad_y, s=down if need_b else None, z=total if need_out else None, want_sum=need_bias,
            factor_mask=lora_out_mask, sum_mask=out_mask,
        )  # fmt: skip
        if need_a or need_adapter:
            up = grad_y.new_empty(grad_y.shape[0], lora_a.shape[0])
            _down(grad_y, lora_b.t(), lora_out_mask, scaling, up)
        if need_a:
            d_a = _reduce_rows(
                x if shared_input else lora_input, s=up, factor_mask=lora_in_mask, transpose=True, dropout=dropout
            )[0]
        if need_x or need_in:
            d_x, d_in = _grad_input(
                grad_y, x if need_in else None, weight, lora_a, up if shared_input and need_adapter else None,
                out_mask, in_mask, mask_lora, dropout, config,
            )  # fmt: skip
        if need_w:
            d_weight = grad_y.t() @ x
            mask_(d_weight, None if out_mask is None else out_mask.unsqueeze(1))
            mask_(d_weight, in_mask)
        if need_adapter and not shared_input:
            d_adapter = up @ lora_a
            if mask_lora and need_in:
                d_in += _reduce_rows(lora_input, z=d_adapter)[1]
            mask_(d_adapter, lora_in_mask)
    found = (d_x, d_weight, d_a, d_b, d_bias, d_adapter, d_out, d_in)
    return tuple(grad if need else None for grad, need in zip(found, needs, strict=True))


def _fusion_pays(rows: Tensor, weight: Tensor, lora_a: Tensor, out_mask: Tensor | None, in_mask: Tensor | None) -> bool:
    masked = out_mask is not None or in_mask is not None
    return masked and rows.shape[0] > 0 and weight.numel() > 0 and 0 < lora_a.shape[0] <= tiles.LARGEST_RANK


def _readable(tensor: Tensor | None) -> Tensor | None:
    """The operand as the kernels can read it: a vector in one piece, a matrix whose strides leave room in 32 bits.

    Kernels take the strides of matrices, which they add up in 32 bits within a tile, and none of vectors.
    """
    if tensor is None or tensor.is_contiguous() or (tensor.ndim == 2 and max(tensor.stride()) < _LARGEST_STRIDE):
        return tensor
    return tensor.contiguous()


def _grad_input(grad_y, x, weight, lora_a, up, out_mask, in_mask, mask_lora, dropout, config):
    """dx, and the in-mask's gradient when x is given: the forward's kernel with inputs and outputs exchanged."""
    m, k = grad_y.shape[0], weight.shape[1]
    config = config or tiles.gemm_config(m, k, lora_a.shape[0], grad_y.dtype)
    d_x = grad_y.new_empty(m, k)
    parts = None if x is None else grad_y.new_empty(triton.cdiv(m, config.block_m), k, dtype=torch.float32)
    _gemm(
        grad_y, weight.t(), lora_a.t(), up, in_mask, out_mask, d_x, config,
        mask_lora=mask_lora, other=x, parts=parts, dropout=dropout,
    )  # fmt: skip
    return d_x, None if parts is None else _sum_partials(parts.unsqueeze(-1), None, parts.new_empty(k, 1)).squeeze(-1)


def _gemm(
    x, weight, lora_b, down, out_mask, in_mask, y, config, *, mask_lora, scaling=1.0,
    lora_a=None, lora_input=None, bias=None, total=None, other=None, parts=None, b_sq=None, a_sq=None,
    dropout=None,
):  # fmt: skip
    (m, n), k, rank = y.shape, x.shape[1], lora_b.shape[1]
    grid = (triton.cdiv(m, config.block_m) * triton.cdiv(n, config.block_n),)
    kernels.masked_lora_gemm_kernel[grid](
        x, weight, lora_a, lora_b, lora_input, down, bias, _bytes(out_mask), _bytes(in_mask),
        y, total, other, parts, b_sq, a_sq, m, n, k, scaling, _seed(dropout),
        *x.stride(), *weight.stride(), *_strides(lora_a), *lora_b.stride(), *_strides(lora_input), *_strides(other),
        MASK_LORA=mask_lora, ONE_PASS=lora_a is not None, EVEN_K=k % config.block_k == 0,
        WIDE=_wide(x, weight, lora_b, lora_input, down, other, y),
        BLOCK_M=config.block_m, BLOCK_N=config.block_n, BLOCK_K=config.block_k,
        RANK=rank, BLOCK_R=tiles.rank_block(rank), STEP_R=tiles.rank_step(rank, x.dtype), GROUP_M=config.group_m,
        **_drawn(dropout), **_numerics(x.dtype), num_warps=config.num_warps, num_stages=config.num_stages,
    )  # fmt: skip


def _down(x, lora_a, mask, scaling, down, a_sq=None, dropout=None):
    """down = scaling * ((mask * x after dropout) A^T), and the column squares of A."""
    (m, k), rank = x.shape, lora_a.shape[0]
    config = tiles.down_config(m, x.dtype)
    kernels.lora_down_kernel[(triton.cdiv(m, config.block_wide),)](
        x, lora_a, _bytes(mask), down, a_sq, m, k, scaling, _seed(dropout), *x.stride(), *lora_a.stride(),
        EVEN_K=k % config.block_long == 0, WIDE=_wide(x, down),
        BLOCK_M=config.block_wide, BLOCK_K=config.block_long,
        RANK=rank, BLOCK_R=tiles.rank_block(rank), **_drawn(dropout), **_numerics(x.dtype),
        num_warps=config.num_warps, num_stages=config.num_stages,
    )  # fmt: skip


def _reduce_rows(g, s=None, z=None, want_sum=False, factor_mask=None, sum_mask=None, transpose=False, dropout=None):
    """(mask * g^T s, column sums of g * z, mask * column sums of g) from one read of g; None where not asked.

    With dropout g is what it leaves of the given one.
    """
    if s is None and z is None and not want_sum:
        return None, None, None
    (m, c), rank = g.shape, 1 if s is None else s.shape[1]
    config = tiles.reduce_config(g.dtype)
    splits = tiles.row_splits(m, c, config)
    part = lambda *shape: g.new_empty(splits, c, *shape, dtype=torch.float32)  # noqa: E731
    factor = None if s is None else part(rank)
    dot = None if z is None else part(1)
    total = part(1) if want_sum else None
    kernels.column_reduce_kernel[(triton.cdiv(c, config.block_wide), splits)](
        g, s, z, factor, dot, total, m, c, triton.cdiv(m, splits), _seed(dropout), *g.stride(), *_strides(z),
        WIDE=_wide(g, s, z), BLOCK_M=config.block_long, BLOCK_C=config.block_wide,
        RANK=rank, BLOCK_R=tiles.rank_block(rank),
        **_drawn(dropout), **_numerics(g.dtype), num_warps=config.num_warps, num_stages=config.num_stages,
    )  # fmt: skip
    d_factor = None
    if factor is not None:
        d_factor = g.new_empty((rank, c) if transpose else (c, rank))
        _sum_partials(factor, factor_mask, d_factor.t() if transpose else d_factor)
    d_dot = None if dot is None else _sum_partials(dot, None, dot.new_empty(c, 1)).squeeze(1)
    d_sum = None if total is None else _sum_partials(total, sum_mask, g.new_empty(c, 1)).squeeze(1)
    return d_factor, d_dot, d_sum


def _sum_partials(parts, mask, out):
    splits, c, r = parts.shape
    kernels.sum_partials_kernel[(triton.cdiv(c, 64),)](
        parts, _bytes(mask), out, splits, c, *out.stride(), R=r, BLOCK_C=64, BLOCK_R=triton.next_power_of_2(r)
    )
    return out


def dropped(values: Tensor, dropout: Dropout) -> Tensor:
    """`reference.dropped`, in one launch."""
    (m, k), config = values.shape, tiles.DROPOUT
    result = values.new_empty(m, k)
    if values.numel() > 0:
        with torch.cuda.device_of(values):
            kernels.dropout_kernel[(triton.cdiv(m, config.block_long), triton.cdiv(k, config.block_wide))](
                values, result, m, k, _seed(dropout), *values.stride(), WIDE=_wide(values),
                BLOCK_M=config.block_long, BLOCK_K=config.block_wide, **_drawn(dropout), num_warps=config.num_warps,
            )  # fmt: skip
    return result


_PRIMITIVES = Primitives(dropped=dropped)


def _seed(dropout: Dropout | None) -> int:
    return 0 if dropout is None else dropout.seed


def _drawn(dropout: Dropout | None) -> dict[str, object]:
    """A threshold of zero keeps every element, so the kernels take it for no dropout and draw nothing."""
    return {
        "THRESHOLD": 0 if dropout is None else dropout.threshold,
        "SCALE": 1.0 if dropout is None else dropout.scale,
    }


def _numerics(dtype: torch.dtype) -> dict[str, object]:
    # The older `torch.get_float32_matmul_precision` raises once anybody has set the precision of one operation alone.
    tensor_cores = dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32"
    return {
        "UPCAST": INTERPRETED and dtype == torch.bfloat16,
        "PRECISION": "tf32" if tensor_cores else "ieee",
        "enable_fp_fusion": True,
    }


def _wide(*tensors: Tensor | None) -> bool:
    """Whether an offset into one of the tensors can pass int32."""
    given = [tensor for tensor in tensors if tensor is not None]
    return any(sum((n - 1) * s for n, s in zip(t.shape, t.stride(), strict=True)) >= _INT32_LIMIT for t in given)


def _strides(tensor: Tensor | None) -> tuple[int, int]:
    return (0, 0) if tensor is None else tensor.stride()


def _bytes(mask: Tensor | None) -> Tensor | None:
    return mask.view(torch.uint8) if mask is not None and mask.dtype == torch.bool else mask
