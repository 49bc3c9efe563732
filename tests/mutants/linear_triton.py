"""Triton's kernels of the masked linear and what launches them."""

from mutants.mutant import Table

KERNELS = "atp_kernels/backends/triton/kernels.py"
LAUNCHER = "atp_kernels/backends/triton/masked_lora_linear.py"

TILED = "tests/atp_kernels/test_linear_triton.py -k 'every_combination and soft-soft'"
FENCED = "tests/atp_kernels/test_linear_triton.py -k nothing_is_read_outside"
DROPPED = "tests/atp_kernels/test_linear_triton.py -k 'combination_with_dropout and soft-soft'"
BESIDE = "tests/atp_kernels/test_linear_triton.py -k without_masks"
STRIDED = "tests/atp_kernels/test_strides.py -k 'linear-hard and triton'"
FAR = "tests/atp_kernels/test_linear_triton.py -k offsets_past"
FIT = "tests/atp_kernels/test_linear_triton.py -k vendor_gemm"
SPLIT = "tests/atp_kernels/test_linear_triton.py -k tiles_of_the_table"

TABLE: Table = {
    (KERNELS, TILED): (
        ("total = _dot(part, b, total, UPCAST, PRECISION)", "pass"),
        ("tl.sum(b * b, axis=1), mask=ok", "tl.sum(b, axis=1), mask=ok"),
        ("x_masked = (x.to(tl.float32) * in_mask[None, :]).to(x.dtype)", "x_masked = x"),
        ("adapter = (adapter.to(tl.float32) * in_mask[None, :]).to(x.dtype)", "adapter = adapter"),
        ("if MASK_LORA and in_mask_ptr is not None:", "if in_mask_ptr is not None:"),
        ("adapter = tl.load(l_ptrs, mask=x_ok, other=0.0)", "adapter = x"),
        ("tl.sum(a_wide * a_wide, axis=1), mask=ks < tl.where(pid == 0, K - k, 0))\n            a_ptrs",
         "tl.sum(a_wide, axis=1), mask=ks < tl.where(pid == 0, K - k, 0))\n            a_ptrs"),
        ("tl.sum(a_wide * a_wide, axis=1), mask=ks < tl.where(pid == 0, K - k, 0))\n        x_ptrs",
         "tl.sum(a_wide, axis=1), mask=ks < tl.where(pid == 0, K - k, 0))\n        x_ptrs"),
        ("if bias_ptr is not None:", "if False:"),
        ("s = (s_acc * scaling)", "s = (s_acc * 1.0)"),
        ("if s_ptr is not None and MASK_LORA:", "if False:"),
        ("if s_ptr is not None and MASK_LORA:", "if s_ptr is not None:"),
        ("if s_ptr is not None and not MASK_LORA:", "if False:"),
        ("if s_ptr is not None and not MASK_LORA:", "if s_ptr is not None:"),
        ("tl.store(sum_ptr + rows[:, None] * N + cols[None, :], acc.to(", "tl.store(sum_ptr + rows[:, None] * N + "
         "cols[None, :], (2 * acc).to("),
        ("tl.sum(other.to(tl.float32) * acc, axis=0)", "tl.sum(other.to(tl.float32), axis=0)"),
        ("if out_mask_ptr is not None:", "if False:"),
        ("x = (x.to(tl.float32) * mask[None, :]).to(x.dtype)", "x = x"),
        ("(acc * scaling).to(s_ptr", "acc.to(s_ptr"),
        ("tl.sum(g.to(tl.float32) * z.to(tl.float32), axis=0)", "tl.sum(g.to(tl.float32), axis=0)"),
        ("total += tl.sum(g.to(tl.float32), axis=0)", "total += 0"),
        ("if mask_ptr is not None:\n        total *=", "if False:\n        total *="),
    ),
    (KERNELS, DROPPED): (
        ("quads = first_col // 4 + tl.arange", "quads = tl.arange"),
        ("n_rounds=_ROUNDS", "n_rounds=10"),
        ("tl.join(w0 >= THRESHOLD, w2 >= THRESHOLD)", "tl.join(w0 >= THRESHOLD, w1 >= THRESHOLD)"),
        ("tl.join(even, odd)", "tl.join(odd, even)"),
        ("values.to(tl.float32) * SCALE, 0.0)", "values.to(tl.float32), 0.0)"),
        ("total = tl.zeros_like(acc)", "pass"),
        ("total = acc + _dropped(total, rows, first_col, seed, THRESHOLD, SCALE)", "total = acc + total"),
        ("x = _dropped(x, rows, k, seed, THRESHOLD, SCALE)", "pass"),
        ("g = _dropped(g, rows, pid_c * BLOCK_C, seed, THRESHOLD, SCALE)", "pass"),
    ),
    (KERNELS, BESIDE): (("y = _dropped(x, rows, first_col, seed, THRESHOLD, SCALE)", "y = x"),),
    (KERNELS, FENCED): (
        ("mask=col_ok[None, :] & (ranks < RANK)[:, None]", "mask=col_ok[None, :]"),
        ("x_ok = row_ok[:, None] & (ks < K - k)[None, :]\n            w_ok",
         "x_ok = row_ok[:, None]\n            w_ok"),
        ("w_ok = col_ok[None, :] & (ks < K - k)[:, None]", "w_ok = col_ok[None, :]"),
        ("(in_mask_ptr + k + ks, mask=ks < K - k, other=0)", "(in_mask_ptr + k + ks)"),
        ("x_ok = row_ok[:, None] if EVEN_K else row_ok[:, None] & (ks < K - k)[None, :]", "x_ok = row_ok[:, None]"),
        ("g_ok = row_ok[:, None] & col_ok[None, :]", "g_ok = col_ok[None, :]"),
    ),
    (KERNELS, SPLIT): (
        ("row_ok = rows < last", "row_ok = rows < M"),
        ("last = min(first + rows_per_split, M)", "last = M"),
        ("part_ptr += C * R", "part_ptr += 0"),
    ),
    (LAUNCHER, TILED): (
        ("_down(adapter_input, lora_a, in_mask if mask_lora else None,", "_down(adapter_input, lora_a, None,"),
        ("_down(adapter_input, lora_a, in_mask if mask_lora else None,", "_down(adapter_input, lora_a, in_mask,"),
        ("x if lora_input is None else lora_input\n            _down", "x\n            _down"),
        ("out_mask, in_mask, y, config, mask_lora", "None, in_mask, y, config, mask_lora"),
        ("out_mask, in_mask, y, config, mask_lora", "out_mask, None, y, config, mask_lora"),
        ("bias=bias, total=total", "bias=None, total=total"),
        ("lora_out_mask = out_mask if mask_lora else None", "lora_out_mask = None"),
        ("lora_out_mask = out_mask if mask_lora else None", "lora_out_mask = out_mask"),
        ("lora_in_mask = in_mask if mask_lora else None", "lora_in_mask = None"),
        ("lora_in_mask = in_mask if mask_lora else None", "lora_in_mask = in_mask"),
        ("factor_mask=lora_out_mask, sum_mask=out_mask", "factor_mask=None, sum_mask=out_mask"),
        ("factor_mask=lora_out_mask, sum_mask=out_mask", "factor_mask=lora_out_mask"),
        ("_down(grad_y, lora_b.t(), lora_out_mask, scaling, up)", "_down(grad_y, lora_b.t(), lora_out_mask, 1.0, up)"),
        ("_down(grad_y, lora_b.t(), lora_out_mask, scaling, up)", "_down(grad_y, lora_b.t(), None, scaling, up)"),
        ("factor_mask=lora_in_mask, transpose=True", "transpose=True"),
        ("mask_(d_weight, None if out_mask is None else out_mask.unsqueeze(1))", "pass"),
        ("mask_(d_weight, in_mask)", "pass"),
        ("d_in += _reduce_rows(lora_input, z=d_adapter)[1]", "pass"),
        ("mask_(d_adapter, lora_in_mask)", "pass"),
        ("up, in_mask, out_mask, d_x, config", "up, None, out_mask, d_x, config"),
        ("up, in_mask, out_mask, d_x, config", "up, in_mask, None, d_x, config"),
    ),
    (LAUNCHER, DROPPED): (
        ("scaling, down, a_sq, dropout)", "scaling, down, a_sq)"),
        ("transpose=True, dropout=dropout", "transpose=True"),
        ("parts=parts, dropout=dropout", "parts=parts"),
    ),
    (LAUNCHER, "tests/atp_kernels/test_linear_triton.py -k half_precision"): (
        ("one_pass = config.one_pass and dropout is None", "one_pass = config.one_pass"),
    ),
    (LAUNCHER, STRIDED): (("return tensor.contiguous()", "return tensor"),),
    (LAUNCHER, FAR): (
        ("_wide(x, weight, lora_b, lora_input, down, other, y)", "_wide(x, lora_b, lora_input, down, other, y)"),
        ("_wide(x, weight, lora_b, lora_input, down, other, y)", "_wide(x, weight, lora_input, down, other, y)"),
        ("_wide(x, weight, lora_b, lora_input, down, other, y)", "_wide(x, weight, lora_b, down, other, y)"),
        ("_wide(x, weight, lora_b, lora_input, down, other, y)", "_wide(x, weight, lora_b, lora_input, down, y)"),
        ("WIDE=_wide(g, s, z)", "WIDE=False"),
    ),
    (KERNELS, FAR): (("    if WIDE:\n        cols = cols.to(tl.int64)\n    first = split", "    first = split"),),
    (LAUNCHER, FIT): (
        ("rows.shape[0] > 0 and weight.numel() > 0", "weight.numel() > 0"),
        ("rows.shape[0] > 0 and weight.numel() > 0", "rows.shape[0] > 0"),
    ),
    (LAUNCHER, "tests/atp_kernels/test_precision.py"): (
        ("tensor_cores = dtype == torch.float32 and", "tensor_cores ="),
        ('torch.backends.cuda.matmul.fp32_precision == "tf32"', 'torch.get_float32_matmul_precision() != "highest"'),
    ),
    (LAUNCHER, BESIDE): (
        ("keep_sum, with_norms, dropout, primitives=_PRIMITIVES", "keep_sum, with_norms, primitives=_PRIMITIVES"),
        ("shared_input, needs, dropout, primitives=_PRIMITIVES", "shared_input, needs, primitives=_PRIMITIVES"),
    ),
}  # fmt: skip
