"""The Triton kernels of the masked LoRA linear: `linear.triton` launches them, `atp_kernels.offline` compiles them.

One GEMM kernel serves the forward pass and dx, because they are the same formula with the roles exchanged:
    y  = m_out * ((m_in  * x) W^T) + S B^T      reduces over in,  S = scaling * (lora_input A^T)
    dx = m_in  * ((m_out * G) W  ) + P A        reduces over out, P = scaling * (G B)
and one reduction serves the factors:  dB = m_out * (G^T S),  dA^T = m_in * (lora_input^T P).  Folding `scaling` into
S and P keeps a multiplication, and a second accumulator, out of the GEMM.

With dropout D (`dropout.definition.dropped`), S = scaling * ((D x) A^T), dA^T = m_in * ((D x)^T P) and dx has D (P A):
each kernel that comes by an element draws its bit again.
"""

import triton
import triton.language as tl

from atp_kernels.dropout.triton import dropped_tile, seed_of


@triton.jit
def product(left, right, acc, UPCAST: tl.constexpr, PRECISION: tl.constexpr):
    # The interpreter has no correct bfloat16 product; a GPU never takes the upcast branch.
    if UPCAST:
        left = left.to(tl.float32)
        right = right.to(tl.float32)
    return tl.dot(left, right, acc, input_precision=PRECISION)


@triton.jit
def add_adapter(
    acc, s, s_ptr, b_ptr, rows, cols, row_ok, col_ok, stride_bn, stride_br, first_col, seed,
    RANK: tl.constexpr, BLOCK_R: tl.constexpr, STEP_R: tl.constexpr, THRESHOLD: tl.constexpr, SCALE: tl.constexpr,
    UPCAST: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """acc + D (s b^T), with s from registers or, when it is None, from memory in steps of the rank."""
    total = acc
    if THRESHOLD > 0:
        total = tl.zeros_like(acc)
    # Without tensor cores every thread holds whole rows of both operands: float32 takes a wide rank in steps.
    STEP: tl.constexpr = STEP_R if s is None else BLOCK_R
    for start in tl.static_range(0, BLOCK_R, STEP):
        ranks = start + tl.arange(0, STEP)
        b_ptrs = b_ptr + cols[None, :] * stride_bn + ranks[:, None] * stride_br
        b = tl.load(b_ptrs, mask=col_ok[None, :] & (ranks < RANK)[:, None], other=0.0)
        if s is None:
            s_ok = row_ok[:, None] & (ranks < RANK)[None, :]
            part = tl.load(s_ptr + rows[:, None] * RANK + ranks[None, :], mask=s_ok, other=0.0)
        else:
            part = s
        total = product(part, b, total, UPCAST, PRECISION)
    if THRESHOLD > 0:
        total = acc + dropped_tile(total, rows, first_col, seed, THRESHOLD, SCALE)
    return total


@triton.jit(do_not_specialize=["seed"])
def masked_lora_gemm_kernel(
    x_ptr, w_ptr, a_ptr, b_ptr, l_ptr, s_ptr,
    bias_ptr, out_mask_ptr, in_mask_ptr,
    y_ptr, sum_ptr, other_ptr, dot_ptr,
    M, N, K, scaling,
    stride_xm, stride_xk, stride_wn, stride_wk, stride_ar, stride_ak, stride_bn, stride_br,
    stride_lm, stride_lk, stride_om, stride_on,
    seed: tl.int64, seed_ptr,
    MASK_LORA: tl.constexpr, ONE_PASS: tl.constexpr, EVEN_K: tl.constexpr, WIDE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    RANK: tl.constexpr, BLOCK_R: tl.constexpr, STEP_R: tl.constexpr, GROUP_M: tl.constexpr,
    THRESHOLD: tl.constexpr, SCALE: tl.constexpr, UPCAST: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One tile of out_mask * ((in_mask * x) w^T + bias) + D (s b^T); absent operands are None and cost nothing.

    x [M, K], w [N, K], a [RANK, K], b [N, RANK], l [M, K]; s [M, RANK] and y, sum [M, N] are contiguous.
    ONE_PASS computes s = scaling * (l a^T) on the way; else s is read.
    A THRESHOLD above zero is that of D.
    sum takes the result before the output mask; dot [M tiles, N] takes the column sums of other * that result.
    """
    pid = tl.program_id(0)
    seed = seed_of(seed, seed_ptr)
    tiles_m = tl.cdiv(M, BLOCK_M)
    tiles_n = tl.cdiv(N, BLOCK_N)
    # Neighbouring programs share tiles of x and w through L2.
    group = pid // (GROUP_M * tiles_n)
    group_rows = min(tiles_m - group * GROUP_M, GROUP_M)
    pid_m = group * GROUP_M + (pid % (GROUP_M * tiles_n)) % group_rows
    pid_n = (pid % (GROUP_M * tiles_n)) // group_rows

    rows = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    cols = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    ks = tl.arange(0, BLOCK_K)
    ranks = tl.arange(0, BLOCK_R)
    row_ok = rows < M
    col_ok = cols < N
    if WIDE:
        rows = rows.to(tl.int64)
        cols = cols.to(tl.int64)

    x_ptrs = x_ptr + rows[:, None] * stride_xm + ks[None, :] * stride_xk
    w_ptrs = w_ptr + cols[None, :] * stride_wn + ks[:, None] * stride_wk
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    if ONE_PASS:
        a_ptrs = a_ptr + ranks[None, :] * stride_ar + ks[:, None] * stride_ak
        s_acc = tl.zeros((BLOCK_M, BLOCK_R), dtype=tl.float32)
        if l_ptr is not None:
            l_ptrs = l_ptr + rows[:, None] * stride_lm + ks[None, :] * stride_lk

    for k in range(0, K, BLOCK_K):
        if EVEN_K:
            x_ok = row_ok[:, None]
            w_ok = col_ok[None, :]
        else:
            x_ok = row_ok[:, None] & (ks < K - k)[None, :]
            w_ok = col_ok[None, :] & (ks < K - k)[:, None]
        x = tl.load(x_ptrs, mask=x_ok, other=0.0)
        w = tl.load(w_ptrs, mask=w_ok, other=0.0)
        x_masked = x
        if in_mask_ptr is not None:
            in_mask = tl.load(in_mask_ptr + k + ks, mask=ks < K - k, other=0).to(tl.float32)
            x_masked = (x.to(tl.float32) * in_mask[None, :]).to(x.dtype)
        acc = product(x_masked, w, acc, UPCAST, PRECISION)
        if ONE_PASS:
            a = tl.load(a_ptrs, mask=(ranks < RANK)[None, :] & (ks < K - k)[:, None], other=0.0)
            adapter = x
            if l_ptr is not None:
                adapter = tl.load(l_ptrs, mask=x_ok, other=0.0)
                l_ptrs += BLOCK_K * stride_lk
            if MASK_LORA and in_mask_ptr is not None:
                adapter = (adapter.to(tl.float32) * in_mask[None, :]).to(x.dtype)
            s_acc = product(adapter, a, s_acc, UPCAST, PRECISION)
            a_ptrs += BLOCK_K * stride_ak
        x_ptrs += BLOCK_K * stride_xk
        w_ptrs += BLOCK_K * stride_wk

    if bias_ptr is not None:
        acc += tl.load(bias_ptr + cols, mask=col_ok, other=0.0).to(tl.float32)[None, :]

    s = None
    if ONE_PASS:
        s = (s_acc * scaling).to(x_ptr.dtype.element_ty)
        s_ok = (rows < tl.where(pid_n == 0, M, 0))[:, None] & (ranks < RANK)[None, :]
        tl.store(s_ptr + rows[:, None] * RANK + ranks[None, :], s, mask=s_ok)
    if s_ptr is not None and MASK_LORA:
        acc = add_adapter(
            acc, s, s_ptr, b_ptr, rows, cols, row_ok, col_ok, stride_bn, stride_br, pid_n * BLOCK_N, seed,
            RANK, BLOCK_R, STEP_R, THRESHOLD, SCALE, UPCAST, PRECISION,
        )  # fmt: skip

    tile_ok = row_ok[:, None] & col_ok[None, :]
    if sum_ptr is not None:
        tl.store(sum_ptr + rows[:, None] * N + cols[None, :], acc.to(sum_ptr.dtype.element_ty), mask=tile_ok)
    if dot_ptr is not None:
        other = tl.load(other_ptr + rows[:, None] * stride_om + cols[None, :] * stride_on, mask=tile_ok, other=0.0)
        tl.store(dot_ptr + pid_m * N + cols, tl.sum(other.to(tl.float32) * acc, axis=0), mask=col_ok)
    if out_mask_ptr is not None:
        acc *= tl.load(out_mask_ptr + cols, mask=col_ok, other=0).to(tl.float32)[None, :]
    if s_ptr is not None and not MASK_LORA:
        acc = add_adapter(
            acc, s, s_ptr, b_ptr, rows, cols, row_ok, col_ok, stride_bn, stride_br, pid_n * BLOCK_N, seed,
            RANK, BLOCK_R, STEP_R, THRESHOLD, SCALE, UPCAST, PRECISION,
        )  # fmt: skip
    tl.store(y_ptr + rows[:, None] * N + cols[None, :], acc.to(y_ptr.dtype.element_ty), mask=tile_ok)


@triton.jit(do_not_specialize=["seed"])
def lora_down_kernel(
    x_ptr, a_ptr, mask_ptr, s_ptr,
    M, K, scaling,
    stride_xm, stride_xk, stride_ar, stride_ak,
    seed: tl.int64, seed_ptr,
    EVEN_K: tl.constexpr, WIDE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, RANK: tl.constexpr, BLOCK_R: tl.constexpr,
    THRESHOLD: tl.constexpr, SCALE: tl.constexpr, UPCAST: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """s = scaling * ((mask * D x) a^T), contiguous [M, RANK]."""
    pid = tl.program_id(0)
    seed = seed_of(seed, seed_ptr)
    rows = pid * BLOCK_M + tl.arange(0, BLOCK_M)
    ks = tl.arange(0, BLOCK_K)
    ranks = tl.arange(0, BLOCK_R)
    row_ok = rows < M
    if WIDE:
        rows = rows.to(tl.int64)
    x_ptrs = x_ptr + rows[:, None] * stride_xm + ks[None, :] * stride_xk
    a_ptrs = a_ptr + ranks[None, :] * stride_ar + ks[:, None] * stride_ak
    acc = tl.zeros((BLOCK_M, BLOCK_R), dtype=tl.float32)
    for k in range(0, K, BLOCK_K):
        x_ok = row_ok[:, None] if EVEN_K else row_ok[:, None] & (ks < K - k)[None, :]
        x = tl.load(x_ptrs, mask=x_ok, other=0.0)
        a = tl.load(a_ptrs, mask=(ranks < RANK)[None, :] & (ks < K - k)[:, None], other=0.0)
        if THRESHOLD > 0:
            x = dropped_tile(x, rows, k, seed, THRESHOLD, SCALE)
        if mask_ptr is not None:
            mask = tl.load(mask_ptr + k + ks, mask=ks < K - k, other=0).to(tl.float32)
            x = (x.to(tl.float32) * mask[None, :]).to(x.dtype)
        acc = product(x, a, acc, UPCAST, PRECISION)
        x_ptrs += BLOCK_K * stride_xk
        a_ptrs += BLOCK_K * stride_ak
    s_ok = row_ok[:, None] & (ranks < RANK)[None, :]
    tl.store(s_ptr + rows[:, None] * RANK + ranks[None, :], (acc * scaling).to(s_ptr.dtype.element_ty), mask=s_ok)


@triton.jit(do_not_specialize=["seed"])
def column_reduce_kernel(
    g_ptr, s_ptr, z_ptr, factor_ptr, dot_ptr, sum_ptr,
    M, C, rows_per_split,
    stride_gm, stride_gc, stride_zm, stride_zc,
    seed: tl.int64, seed_ptr,
    WIDE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr, RANK: tl.constexpr, BLOCK_R: tl.constexpr,
    THRESHOLD: tl.constexpr, SCALE: tl.constexpr, UPCAST: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """First stage of every reduction over rows of D g [M, C], one split of the rows per program, in float32.

    factor [splits, C, RANK] = g^T s with s [M, RANK] contiguous; dot [splits, C] = column sums of g * z;
    sum [splits, C] = column sums of g. One read of g serves whichever of the three are not None.
    """
    pid_c = tl.program_id(0)
    split = tl.program_id(1)
    seed = seed_of(seed, seed_ptr)
    cols = pid_c * BLOCK_C + tl.arange(0, BLOCK_C)
    ranks = tl.arange(0, BLOCK_R)
    col_ok = cols < C
    if WIDE:
        cols = cols.to(tl.int64)
    first = split * rows_per_split
    last = min(first + rows_per_split, M)
    factor = tl.zeros((BLOCK_C, BLOCK_R), dtype=tl.float32)
    dot = tl.zeros((BLOCK_C,), dtype=tl.float32)
    total = tl.zeros((BLOCK_C,), dtype=tl.float32)
    for start in range(first, last, BLOCK_M):
        rows = start + tl.arange(0, BLOCK_M)
        row_ok = rows < last
        if WIDE:
            rows = rows.to(tl.int64)
        g_ok = row_ok[:, None] & col_ok[None, :]
        g = tl.load(g_ptr + rows[:, None] * stride_gm + cols[None, :] * stride_gc, mask=g_ok, other=0.0)
        if THRESHOLD > 0:
            g = dropped_tile(g, rows, pid_c * BLOCK_C, seed, THRESHOLD, SCALE)
        if factor_ptr is not None:
            s_ok = row_ok[:, None] & (ranks < RANK)[None, :]
            s = tl.load(s_ptr + rows[:, None] * RANK + ranks[None, :], mask=s_ok, other=0.0)
            factor = product(tl.trans(g), s, factor, UPCAST, PRECISION)
        if dot_ptr is not None:
            z = tl.load(z_ptr + rows[:, None] * stride_zm + cols[None, :] * stride_zc, mask=g_ok, other=0.0)
            dot += tl.sum(g.to(tl.float32) * z.to(tl.float32), axis=0)
        if sum_ptr is not None:
            total += tl.sum(g.to(tl.float32), axis=0)
    base = split * C + cols
    if factor_ptr is not None:
        f_ok = col_ok[:, None] & (ranks < RANK)[None, :]
        tl.store(factor_ptr + base[:, None] * RANK + ranks[None, :], factor, mask=f_ok)
    if dot_ptr is not None:
        tl.store(dot_ptr + base, dot, mask=col_ok)
    if sum_ptr is not None:
        tl.store(sum_ptr + base, total, mask=col_ok)


@triton.jit
def sum_partials_kernel(
    part_ptr, mask_ptr, out_ptr, SPLITS, C, stride_oc, stride_or,
    R: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """Second stage: out [C, R] = mask [C] * the sum over splits, always in the same order (so: deterministic)."""
    cols = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    ranks = tl.arange(0, BLOCK_R)
    ok = (cols < C)[:, None] & (ranks < R)[None, :]
    offsets = cols[:, None] * R + ranks[None, :]
    total = tl.zeros((BLOCK_C, BLOCK_R), dtype=tl.float32)
    for _ in range(SPLITS):
        total += tl.load(part_ptr + offsets, mask=ok, other=0.0)
        part_ptr += C * R
    if mask_ptr is not None:
        total *= tl.load(mask_ptr + cols, mask=cols < C, other=0).to(tl.float32)[:, None]
    out_ptrs = out_ptr + cols[:, None] * stride_oc + ranks[None, :] * stride_or
    tl.store(out_ptrs, total.to(out_ptr.dtype.element_ty), mask=ok)
