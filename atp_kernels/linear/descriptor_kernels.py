"""The masked LoRA linear by tensor descriptors: one persistent kernel, which `linear.descriptors` launches.

As `triton_kernels.masked_lora_gemm_kernel` it serves the forward pass and dx, with the roles exchanged:
    y  = m_out * (x W^T + bias) + S B^T      reduces over in
    dx = m_in  * (G W)          + P A        reduces over out
What differs: matrices come and go by the tensor memory accelerator (TMA) where the GPU has one; no mask lies in the
loop, where it would take an operand of the tensor cores through registers (the launcher scales a matrix instead); and a
tile that no kept row or column reaches does without the base product.
"""

import triton
import triton.language as tl

from atp_kernels.linear.triton_kernels import add_adapter, product


@triton.jit
def _base_step(x_desc, w_desc, row, col, k, acc, W_BY_K: tl.constexpr, UPCAST: tl.constexpr, PRECISION: tl.constexpr):
    """(x tile, acc + x tile w tile^T)."""
    x = x_desc.load([row, k])
    w = w_desc.load([k, col]) if W_BY_K else tl.trans(w_desc.load([col, k]))
    return x, product(x, w, acc, UPCAST, PRECISION)


@triton.jit(do_not_specialize=["base_n", "base_k"])
def masked_lora_descriptor_kernel(
    x_desc, w_desc, a_desc, l_desc, y_desc, sum_desc,
    b_ptr, s_ptr, bias_ptr, out_mask_ptr, other_ptr, dot_ptr,
    M, N, K, base_n, base_k, scaling,
    stride_bn, stride_br, stride_om, stride_on,
    MASK_LORA: tl.constexpr, ONE_PASS: tl.constexpr, W_BY_K: tl.constexpr, WIDE: tl.constexpr,
    WARP_SPECIALIZE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    RANK: tl.constexpr, BLOCK_R: tl.constexpr, STEP_R: tl.constexpr, GROUP_M: tl.constexpr,
    UPCAST: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """y = out_mask * (x w^T + bias) + s b^T, a tile at a time; absent operands are None and cost nothing.

    x [M, K], a [RANK, K], b [N, RANK], l [M, K]; s [M, RANK] and y, sum [M, N] are contiguous. w [base_n, base_k] and
    bias [base_n] are the kept part of the base: a head of the N outputs and of the K inputs, or all of them. W_BY_K
    says that its descriptor is of w^T.
    ONE_PASS computes s = scaling * (l a^T) on the way, with l = x where it is None; else s is read, or None.
    sum takes the result before the output mask; dot [M tiles, N] takes the column sums of other * that result. Without
    both of them a tile whose output mask is all zero does without the base product too.
    """
    tiles_m = tl.cdiv(M, BLOCK_M)
    tiles_n = tl.cdiv(N, BLOCK_N)
    for tile in range(tl.program_id(0), tiles_m * tiles_n, tl.num_programs(0)):
        # Neighbouring tiles share rows of x and w through L2.
        group = tile // (GROUP_M * tiles_n)
        group_rows = min(tiles_m - group * GROUP_M, GROUP_M)
        tile_m = group * GROUP_M + (tile % (GROUP_M * tiles_n)) % group_rows
        tile_n = (tile % (GROUP_M * tiles_n)) // group_rows
        row, col = tile_m * BLOCK_M, tile_n * BLOCK_N
        rows = row + tl.arange(0, BLOCK_M)
        cols = col + tl.arange(0, BLOCK_N)
        row_ok, col_ok = rows < M, cols < N
        if WIDE:
            rows, cols = rows.to(tl.int64), cols.to(tl.int64)

        end = tl.where(col < base_n, base_k, 0)
        if out_mask_ptr is not None:
            out_mask = tl.load(out_mask_ptr + cols, mask=col_ok, other=0).to(tl.float32)
            if sum_desc is None and dot_ptr is None:
                end = tl.where(tl.max(tl.where(out_mask != 0, 1, 0), axis=0) > 0, end, 0)

        acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
        s = None
        if ONE_PASS:
            s_acc = tl.zeros((BLOCK_M, BLOCK_R), dtype=tl.float32)
            for k in range(0, end, BLOCK_K):
                x, acc = _base_step(x_desc, w_desc, row, col, k, acc, W_BY_K, UPCAST, PRECISION)
                if l_desc is not None:
                    x = l_desc.load([row, k])
                s_acc = product(x, tl.trans(a_desc.load([0, k])), s_acc, UPCAST, PRECISION)
            # What is left of the inputs is the adapter's alone.
            for k in range(tl.cdiv(end, BLOCK_K) * BLOCK_K, K, BLOCK_K):
                adapter = x_desc.load([row, k]) if l_desc is None else l_desc.load([row, k])
                s_acc = product(adapter, tl.trans(a_desc.load([0, k])), s_acc, UPCAST, PRECISION)
            s = (s_acc * scaling).to(x_desc.dtype)
            ranks = tl.arange(0, BLOCK_R)
            s_ok = (rows < tl.where(tile_n == 0, M, 0))[:, None] & (ranks < RANK)[None, :]
            tl.store(s_ptr + rows[:, None] * RANK + ranks[None, :], s, mask=s_ok)
        else:
            for k in tl.range(0, end, BLOCK_K, warp_specialize=WARP_SPECIALIZE):
                _, acc = _base_step(x_desc, w_desc, row, col, k, acc, W_BY_K, UPCAST, PRECISION)

        if bias_ptr is not None:
            acc += tl.load(bias_ptr + cols, mask=cols < base_n, other=0.0).to(tl.float32)[None, :]
        if s_ptr is not None and MASK_LORA:
            acc = add_adapter(
                acc, s, s_ptr, b_ptr, rows, cols, row_ok, col_ok, stride_bn, stride_br, 0, 0,
                RANK, BLOCK_R, STEP_R, 0, 1.0, UPCAST, PRECISION,
            )  # fmt: skip
        if sum_desc is not None:
            sum_desc.store([row, col], acc.to(sum_desc.dtype))
        if dot_ptr is not None:
            tile_ok = row_ok[:, None] & col_ok[None, :]
            other = tl.load(other_ptr + rows[:, None] * stride_om + cols[None, :] * stride_on, mask=tile_ok, other=0.0)
            tl.store(dot_ptr + tile_m * N + cols, tl.sum(other.to(tl.float32) * acc, axis=0), mask=col_ok)
        if out_mask_ptr is not None:
            acc *= out_mask[None, :]
        if s_ptr is not None and not MASK_LORA:
            acc = add_adapter(
                acc, s, s_ptr, b_ptr, rows, cols, row_ok, col_ok, stride_bn, stride_br, 0, 0,
                RANK, BLOCK_R, STEP_R, 0, 1.0, UPCAST, PRECISION,
            )  # fmt: skip
        y_desc.store([row, col], acc.to(y_desc.dtype))
