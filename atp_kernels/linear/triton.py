"""The masked LoRA linear in Triton: which kernels a call needs, with which tiles.

Where a piece has nothing to fuse, the vendor GEMM takes it: a call without masks (Triton reaches about 0.87 of cuBLAS
on H100, which costs more than an `addmm_` of the adapter), dW, whose masks scale rows and columns of the result, and
the gradient of a separate lora_input, which is all memory traffic. Dropout then has a kernel of its own.
"""

# Which of the saved tensors are None follows from `needs`, which a type checker cannot see.
# mypy: disable-error-code="union-attr,operator,arg-type,assignment"

import torch
import triton
from torch import Tensor

from atp_kernels import triton_runtime
from atp_kernels.call import Call
from atp_kernels.dropout.triton import drawn, dropped
from atp_kernels.linear import aten, descriptors, tiles
from atp_kernels.linear import triton_kernels as kernels
from atp_kernels.linear.operands import Gradients, Needs, Operands, Options, Results, Saved
from atp_kernels.triton_runtime import INTERPRETED, passes_int32, stages

ADDMM_CHAIN = False

LARGEST_STRIDE = 2**23
"""Tiles reach over 128 of either side at most: what these strides add up to within one stays below 2**31.

So do factors of that width and the largest rank; what is wider goes to the vendor GEMM.
"""

_PRIMITIVES = aten.Primitives(dropped=dropped)


def supports(call: Call) -> str | None:
    """float32, float16 and bfloat16, on CUDA or in the interpreter."""
    return triton_runtime.refuses(call)


def forward(operands: Operands, options: Options, *, config: tiles.GemmConfig | None = None) -> Results:
    """As `aten.forward`; a `config` forces the kernels and their tile."""
    if config is None and not _fusion_pays(operands.x, operands.weight, operands.lora_a, *operands[6:]):
        return aten.forward(operands, options, primitives=_PRIMITIVES)
    x, weight, lora_a, lora_b, bias, lora_input, out_mask, in_mask = map(readable, operands)
    scaling, mask_lora, keep_sum, dropout = options
    m, n, rank = x.shape[0], weight.shape[0], lora_a.shape[0]
    config = _tile(config, x, weight, lora_a, dropout, lora_input=lora_input, forward=True)
    # With the random words on top, recomputing S takes more registers than there are.
    one_pass = config.one_pass and dropout is None
    y = x.new_empty(m, n)
    s = x.new_empty(m, rank)
    total = x.new_empty(m, n) if keep_sum else None
    with torch.cuda.device_of(x):
        if not one_pass:
            adapter_input = x if lora_input is None else lora_input
            _lora_down(adapter_input, lora_a, in_mask if mask_lora else None, scaling, s, dropout)
        _gemm(
            x, weight, lora_b, s, out_mask, in_mask, y, config, mask_lora=mask_lora, scaling=scaling,
            lora_a=lora_a if one_pass else None, lora_input=lora_input if one_pass else None,
            bias=bias, total=total,
        )  # fmt: skip
    return Results(y, s, total)


def backward(
    grad_y: Tensor, saved: Saved, options: Options, needs: Needs, *, config: tiles.GemmConfig | None = None
) -> Gradients:
    """As `aten.backward`; a `config` forces the kernels and the tile of dx."""
    if config is None and not _fusion_pays(grad_y, saved.weight, saved.lora_a, saved.out_mask, saved.in_mask):
        return aten.backward(grad_y, saved, options, needs, primitives=_PRIMITIVES)
    grad_y, s = readable(grad_y), saved.s
    x, weight, lora_a, lora_b, lora_input, out_mask, in_mask, _, total = map(readable, saved)
    need_x, need_w, need_a, need_b, need_bias, need_adapter, need_out, need_in, shared_input = needs
    mask_lora, dropout = options.mask_lora, options.dropout
    need_adapter = need_adapter or (shared_input and need_x) or (mask_lora and need_in)
    lora_out_mask = out_mask if mask_lora else None
    lora_in_mask = in_mask if mask_lora else None
    up = d_x = d_in = d_a = d_weight = d_adapter = None
    with torch.cuda.device_of(grad_y):
        d_b, d_out, d_bias = _reduce_rows(
            grad_y, s=s if need_b else None, z=total if need_out else None, want_sum=need_bias,
            factor_mask=lora_out_mask, sum_mask=out_mask,
        )  # fmt: skip
        if need_a or need_adapter:
            up = grad_y.new_empty(grad_y.shape[0], lora_a.shape[0])
            _lora_down(grad_y, lora_b.t(), lora_out_mask, options.scaling, up)
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
            aten.mask_(d_weight, None if out_mask is None else out_mask.unsqueeze(1))
            aten.mask_(d_weight, in_mask)
        if need_adapter and not shared_input:
            d_adapter = up @ lora_a
            if mask_lora and need_in:
                d_in += _reduce_rows(lora_input, z=d_adapter)[1]
            aten.mask_(d_adapter, lora_in_mask)
    found = (d_x, d_weight, d_a, d_b, d_bias, d_adapter, d_out, d_in)
    return tuple(grad if need else None for grad, need in zip(found, needs[:8], strict=True))


def _fusion_pays(rows: Tensor, weight: Tensor, lora_a: Tensor, out_mask: Tensor | None, in_mask: Tensor | None) -> bool:
    masked = out_mask is not None or in_mask is not None
    fits = 0 < lora_a.shape[0] <= tiles.LARGEST_RANK and max(weight.shape) < LARGEST_STRIDE
    return masked and fits and rows.shape[0] > 0 and weight.numel() > 0


def readable(tensor: Tensor | None) -> Tensor | None:
    """The operand as the kernels can read it: a vector in one piece, a matrix whose strides leave room in 32 bits.

    Kernels take the strides of matrices, which they add up in 32 bits within a tile, and none of vectors.
    """
    if tensor is None or tensor.is_contiguous() or (tensor.ndim == 2 and max(tensor.stride()) < LARGEST_STRIDE):
        return tensor
    return tensor.contiguous()


def _grad_input(grad_y, x, weight, lora_a, up, out_mask, in_mask, mask_lora, dropout, config):
    """dx, and the in-mask's gradient when x is given: the forward's kernel with inputs and outputs exchanged."""
    m, k = grad_y.shape[0], weight.shape[1]
    config = _tile(config, grad_y, weight.t(), lora_a, dropout, other=x)
    d_x = grad_y.new_empty(m, k)
    parts = None if x is None else grad_y.new_empty(triton.cdiv(m, config.block_m), k, dtype=torch.float32)
    _gemm(
        grad_y, weight.t(), lora_a.t(), up, in_mask, out_mask, d_x, config,
        mask_lora=mask_lora, other=x, parts=parts, dropout=dropout,
    )  # fmt: skip
    return d_x, None if parts is None else _sum_partials(parts.unsqueeze(-1), None, parts.new_empty(k, 1)).squeeze(-1)


def _tile(config, x, weight, lora_a, dropout, *, lora_input=None, other=None, forward=False):
    """The tile of x weight^T: the given or named one, and the table's where descriptors do not take the call."""
    n, rank = weight.shape[0], lora_a.shape[0]
    config = config or tiles.named_tile(x.dtype)
    if isinstance(config, tiles.DescriptorConfig):
        made_on_the_way = lora_a if forward and config.one_pass else None
        if dropout is not None or descriptors.refuses(config, x, weight, n, made_on_the_way, lora_input, other):
            config = None
    return config or tiles.gemm_config(x.shape[0], n, rank, x.dtype)


def _gemm(
    x, weight, lora_b, s, out_mask, in_mask, y, config, *, mask_lora, scaling=1.0,
    lora_a=None, lora_input=None, bias=None, total=None, other=None, parts=None, dropout=None,
):  # fmt: skip
    (m, n), k, rank = y.shape, x.shape[1], lora_b.shape[1]
    if isinstance(config, tiles.DescriptorConfig):
        descriptors.launch(
            x, weight, lora_a, lora_b, s, y, config, numerics(x), scaling=scaling, mask_lora=mask_lora,
            lora_input=lora_input, bias=bias, out_mask=_bytes(out_mask), in_mask=in_mask,
            total=total, other=other, parts=parts,
        )  # fmt: skip
        return
    grid = (triton.cdiv(m, config.block_m) * triton.cdiv(n, config.block_n),)
    kernels.masked_lora_gemm_kernel[grid](
        x, weight, lora_a, lora_b, lora_input, s, bias, _bytes(out_mask), _bytes(in_mask),
        y, total, other, parts, m, n, k, scaling,
        *x.stride(), *weight.stride(), *_strides(lora_a), *lora_b.stride(), *_strides(lora_input), *_strides(other),
        MASK_LORA=mask_lora, ONE_PASS=lora_a is not None, EVEN_K=k % config.block_k == 0,
        WIDE=passes_int32(x, weight, lora_b, lora_input, s, other, y),
        BLOCK_M=config.block_m, BLOCK_N=config.block_n, BLOCK_K=config.block_k,
        RANK=rank, BLOCK_R=tiles.rank_block(rank), STEP_R=tiles.rank_step(rank, x.dtype), GROUP_M=config.group_m,
        **drawn(dropout), **numerics(x), num_warps=config.num_warps, num_stages=stages(config.num_stages),
    )  # fmt: skip


def _lora_down(x, lora_a, mask, scaling, s, dropout=None):
    """s = scaling * ((mask * x after dropout) A^T)."""
    (m, k), rank = x.shape, lora_a.shape[0]
    config = tiles.down_config(m, rank, x.dtype)
    kernels.lora_down_kernel[(triton.cdiv(m, config.block_wide),)](
        x, lora_a, _bytes(mask), s, m, k, scaling, *x.stride(), *lora_a.stride(),
        EVEN_K=k % config.block_long == 0, WIDE=passes_int32(x, s),
        BLOCK_M=config.block_wide, BLOCK_K=config.block_long,
        RANK=rank, BLOCK_R=tiles.rank_block(rank), **drawn(dropout), **numerics(x),
        num_warps=config.num_warps, num_stages=stages(config.num_stages),
    )  # fmt: skip


def _reduce_rows(g, s=None, z=None, want_sum=False, factor_mask=None, sum_mask=None, transpose=False, dropout=None):
    """(mask * g^T s, column sums of g * z, mask * column sums of g) from one read of g; None where not asked.

    With dropout g is what it leaves of the given one.
    """
    if s is None and z is None and not want_sum:
        return None, None, None
    (m, c), rank = g.shape, 1 if s is None else s.shape[1]
    config = tiles.reduce_config(rank, g.dtype)
    splits = tiles.row_splits(m, c, config)
    part = lambda *shape: g.new_empty(splits, c, *shape, dtype=torch.float32)  # noqa: E731
    factor = None if s is None else part(rank)
    dot = None if z is None else part(1)
    total = part(1) if want_sum else None
    kernels.column_reduce_kernel[(triton.cdiv(c, config.block_wide), splits)](
        g, s, z, factor, dot, total, m, c, triton.cdiv(m, splits), *g.stride(), *_strides(z),
        WIDE=passes_int32(g, s, z), BLOCK_M=config.block_long, BLOCK_C=config.block_wide,
        RANK=rank, BLOCK_R=tiles.rank_block(rank),
        **drawn(dropout), **numerics(g), num_warps=config.num_warps, num_stages=stages(config.num_stages),
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
        parts, _bytes(mask), out, splits, c, *out.stride(), R=r, BLOCK_C=64, BLOCK_R=triton.next_power_of_2(r),
        enable_fp_fusion=True,
    )  # fmt: skip
    return out


def numerics(x: Tensor) -> dict[str, object]:
    """How products of x are made, as kernels take it."""
    # The older `torch.get_float32_matmul_precision` raises once anybody has set the precision of one operation alone.
    allowed = x.dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32"
    tensor_cores = allowed and triton_runtime.takes_tf32(x.device)
    return {
        "UPCAST": INTERPRETED and x.dtype == torch.bfloat16,
        "PRECISION": "tf32" if tensor_cores else "ieee",
        "enable_fp_fusion": True,
    }


def _strides(tensor: Tensor | None) -> tuple[int, ...]:
    return (0, 0) if tensor is None else tensor.stride()


def _bytes(mask: Tensor | None) -> Tensor | None:
    return mask.view(torch.uint8) if mask is not None and mask.dtype == torch.bool else mask
