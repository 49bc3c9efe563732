"""Broken lines of the masked LoRA linear."""

DEFINITION = "atp_kernels/linear/definition.py"
ATEN = "atp_kernels/linear/aten.py"
OP = "atp_kernels/linear/op.py"
OPERANDS = "atp_kernels/linear/operands.py"
SHARED = "atp_kernels/call.py"
TRITON_KERNELS = "atp_kernels/linear/triton_kernels.py"
TRITON = "atp_kernels/linear/triton.py"
DESCRIPTOR_KERNELS = "atp_kernels/linear/descriptor_kernels.py"
DESCRIPTORS = "atp_kernels/linear/descriptors.py"
TILES = "atp_kernels/linear/tiles.py"
NATIVE = "atp_kernels/linear/native.py"
CALL = "atp_kernels/linear/__init__.py"

LINEAR_NO_WORSE_THAN = "tests/atp_kernels/test_linear.py -k no_worse_than_unfused"
LINEAR_COMPILED_OPERATOR = "tests/atp_kernels/test_linear.py -k compiled_operator"
PLAIN_LAST_BIT = "tests/atp_kernels/test_plain.py -k last_bit"
PLAIN_ONLY_WHAT_NEEDED = "tests/atp_kernels/test_plain.py -k 'only_what_is_needed or last_bit'"
PLAIN_QUICK_CHECKS = "tests/atp_kernels/test_plain.py -k quick_checks"
ZERO_SIZES_MASKED_LINEAR = "tests/atp_kernels/test_zero_sizes.py -k linear"
EVERY_OPERATION_CONSTANT = "tests/atp_kernels/test_passes.py -k 'constant_upstream and norm'"
EVERY_OPERATION_IN_PLACE = "tests/atp_kernels/test_passes.py -k 'changed_in_place and norm'"
LINEAR_TRITON_EVERY_COMBINATION = "tests/atp_kernels/test_linear_triton.py -k 'every_combination and soft-soft'"
LINEAR_TRITON_COMBINATION_WITH = "tests/atp_kernels/test_linear_triton.py -k 'combination_with_dropout and soft-soft'"
LINEAR_TRITON_NOTHING_READ = "tests/atp_kernels/test_linear_triton.py -k nothing_is_read_outside"
LINEAR_TRITON_TILES_TABLE = "tests/atp_kernels/test_linear_triton.py -k tiles_of_the_table"
LINEAR_TRITON_HALF_PRECISION = "tests/atp_kernels/test_linear_triton.py -k half_precision"
STRIDES_LINEAR_HARD_TRITON = "tests/atp_kernels/test_strides.py -k 'linear-hard and triton'"
LINEAR_TRITON_OFFSETS_PAST = "tests/atp_kernels/test_linear_triton.py -k offsets_past"
OFFSETS_VENDOR_GEMM = "tests/atp_kernels/test_offsets.py -k vendor_gemm"
LINEAR_TRITON_VENDOR_GEMM = "tests/atp_kernels/test_linear_triton.py -k vendor_gemm"
PRECISION = "tests/atp_kernels/test_precision.py"
MERGED_WEIGHT_BITS = "tests/atp_kernels/test_merged_weight.py -k 'not bits'"
LINEAR_TRITON_WITHOUT_MASKS = "tests/atp_kernels/test_linear_triton.py -k without_masks"
DESCRIPTORS_EVERY_COMBINATION = "tests/atp_kernels/test_descriptors.py -k every_combination"
DESCRIPTORS_REMOVED = "tests/atp_kernels/test_descriptors.py -k 'removed or mask_is_zero'"
DESCRIPTORS_ADDRESSED = "tests/atp_kernels/test_descriptors.py -k 'address or refuse or entry or generations'"
DESCRIPTORS_HALF_PRECISION = "tests/atp_kernels/test_descriptors.py -k half_precision"
DESCRIPTORS_KEPT_FIRST = "tests/atp_kernels/test_descriptors.py -k kept_first"
DESCRIPTORS_ENVIRONMENT = "tests/atp_kernels/test_descriptors.py -k environment"
DESCRIPTORS_DROPOUT = "tests/atp_kernels/test_descriptors.py -k dropout_goes"

TABLE = {
    (DEFINITION, LINEAR_NO_WORSE_THAN): (
        ("adapter_input = _masked(adapter_input, in_mask)", "pass"),
        ("base = _masked(x, in_mask) @ weight.T", "base = x @ weight.T"),
        ("base = base + bias", "pass"),
        ("adapter = scaling * (", "adapter = ("),
        ("_masked(base + adapter, out_mask) if mask_lora", "base + adapter if mask_lora"),
        ("else _masked(base, out_mask) + adapter", "else base + adapter"),
        ("else (values * mask).to(values.dtype)", "else values"),
        ("lora_input = dropped(matrix(x), dropout).view(x.shape)", "pass"),
    ),
    (ATEN, LINEAR_NO_WORSE_THAN): (
        ("base_input = primitives.masked(x, in_mask)", "base_input = x"),
        ("adapter_input = base_input", "adapter_input = x"),
        ("if mask_lora and lora_input is None and dropout is None:", "if lora_input is None and dropout is None:"),
        ("if mask_lora and lora_input is None and dropout is None:", "if mask_lora and lora_input is None:"),
        ("primitives.mask_(primitives.dropped(x, dropout), mask)", "primitives.dropped(x, dropout)"),
        ("primitives.mask_(primitives.dropped(x, dropout), mask)", "primitives.masked(x, mask)"),
        (
            "in_sum and dropout is not None:\n        d_x += primitives.dropped(up @ lora_a, dropout)",
            "in_sum and dropout is not None:\n        d_x += up @ lora_a",
        ),
        ("lora_input, in_mask if mask_lora else None,", "lora_input, None,"),
        ("lora_input, in_mask if mask_lora else None,", "lora_input, in_mask,"),
        ("scaled_mm(adapter_input, lora_a.t(), scaling)", "scaled_mm(adapter_input, lora_a.t(), 1.0)"),
        ("torch.mm(low, high, out=out) if bias is None else torch.addmm(bias,", "torch.addmm(low.new_zeros(()),"),
        ("total.addmm_(left, right)", "total"),
        ("in_sum = mask_lora or out_mask is None ", "in_sum = True "),
        ("in_sum = mask_lora or out_mask is None ", "in_sum = out_mask is None "),
        ("primitives.masked(total, out_mask) if keep_sum", "total if keep_sum"),
        ("if keep_sum else primitives.mask_(total, out_mask)", "if keep_sum else total"),
        ("y.addmm_(s, lora_b.t())", "pass"),
        ("grad_base = primitives.masked(grad_y, out_mask)", "grad_base = grad_y"),
        ("grad_lora = grad_base if mask_lora else grad_y", "grad_lora = grad_y"),
        ("grad_lora = grad_base if mask_lora else grad_y", "grad_lora = grad_base"),
        ("mask_and_dot(grad_y, total, out_mask)", "mask_and_dot(grad_y, grad_y, out_mask)"),
        ("d_bias = grad_base.sum(0)", "d_bias = grad_y.sum(0)"),
        ("grad_base.t() @ primitives.masked(x, in_mask)", "grad_base.t() @ x"),
        ("grad_base.t() @ primitives.masked(x, in_mask)", "grad_y.t() @ primitives.masked(x, in_mask)"),
        ("scaled_mm(grad_lora, lora_b, scaling)", "scaled_mm(grad_lora, lora_b, 1.0)"),
        ("sum_of_products(grad_base, weight, low, lora_a)", "sum_of_products(grad_y, weight, low, lora_a)"),
        ("in_sum = mask_lora or in_mask is None\n", "in_sum = True\n"),
        ("in_sum = mask_lora or in_mask is None\n", "in_sum = in_mask is None\n"),
        ("elif need_adapter and in_sum and dropout is not None:", "elif False:"),
        ("if mask_lora and not shared_input:", "if False:"),
        ("primitives.mask_(d_x, in_mask)", "pass"),
        ("if shared_input and not in_sum and dropout is not None:", "if shared_input and dropout is not None:"),
        ("d_x.addmm_(up, lora_a)", "pass"),
        ("primitives.mask_(d_adapter, lora_in_mask)", "pass"),
        ("primitives.masked(x if lora_input is None else lora_input, mask)", "x if lora_input is None else lora_input"),
        ("primitives.masked(x if lora_input is None else lora_input, mask)", "primitives.masked(x, mask)"),
        ("if scaling == 1:", "if True:"),
        ("beta=0, alpha=scaling", "beta=0"),
        ("torch.mul(source, mask, out=target)", "target.copy_(source)"),
        ("block.mul_(mask)", "pass"),
        ("(some.to(total.dtype) * others)", "some.to(total.dtype)"),
        ("return masked(grad, mask), column_dot", "return grad, column_dot"),
        ("lora_in_mask = in_mask if mask_lora else None", "lora_in_mask = None"),
        ("lora_in_mask = in_mask if mask_lora else None", "lora_in_mask = in_mask"),
        ("d_b = grad_lora.t() @ s", "d_b = grad_base.t() @ s"),
    ),
    (ATEN, LINEAR_COMPILED_OPERATOR): (
        ("d_x if need_x else None", "d_x"),
        ("d_adapter if need_lora_input else None", "d_adapter"),
    ),
    (OP, LINEAR_NO_WORSE_THAN): (
        (
            "options = Options(scaling, mask_lora, keeps_sum(out_mask), dropout_of",
            "options = Options(scaling, mask_lora, False, dropout_of",
        ),
    ),
    (OP, PLAIN_LAST_BIT): (
        ("scaled_mm(rows, lora_a.t(), scaling)", "scaled_mm(rows, lora_a.t(), 1.0)"),
        ("d_bias = grad_y.sum(0)", "d_bias = grad_y.sum(0) * 2"),
        ("torch.mm(grad_y.t(), x)", "torch.mm(grad_y.t(), x).neg()"),
        ("scaled_mm(grad_y, lora_b, ctx.scaling)", "scaled_mm(grad_y, lora_b, 1.0)"),
        ("torch.mm(up.t(), x)", "torch.mm(up.t(), x).neg()"),
        ("s, lora_b.t(), bias)", "s, lora_b.t())"),
        ("dense(weight).t(), s, lora_b.t()", "dense(weight).t(), None, lora_b.t()"),
        ("torch.mm(grad_y.t(), s)", "torch.mm(grad_y.t(), s).neg()"),
        ("sum_of_products(grad_y, dense(weight), up, lora_a)", "torch.mm(grad_y, dense(weight))"),
        ("if need_x or need_a else None", "if need_a else None"),
        ("if need_x or need_a else None", "if need_x else None"),
    ),
    (OP, PLAIN_ONLY_WHAT_NEEDED): (
        ("rows if need_w or need_a else None", "rows"),
        ("rows if need_w or need_a else None", "rows if need_a else None"),
        ("rows if need_w or need_a else None", "rows if need_w else None"),
        ("s if need_b else None", "s"),
    ),
    (OPERANDS, PLAIN_QUICK_CHECKS): (
        ("x.ndim == 0 or weight.ndim != 2 or lora_a.ndim != 2", "weight.ndim != 2 or lora_a.ndim != 2"),
        ("x.ndim == 0 or weight.ndim != 2 or lora_a.ndim != 2", "x.ndim == 0 or lora_a.ndim != 2"),
        ("x.ndim == 0 or weight.ndim != 2 or lora_a.ndim != 2", "x.ndim == 0 or weight.ndim != 2"),
        ("x.shape[-1] == n_in == adapter_in", "x.shape[-1] == n_in"),
        ("x.shape[-1] == n_in == adapter_in", "adapter_in == n_in"),
        ("and lora_b.shape == (n_out, rank)", ""),
        ("and weight.dtype == lora_a.dtype == lora_b.dtype == dtype", ""),
        ("and weight.device == lora_a.device == lora_b.device == device", ""),
        ("tensor.shape == shape and tensor.device", "tensor.device"),
        ("and tensor.device == device and", "and"),
        ("and tensor.dtype in dtypes", ""),
        ("masks = (torch.bool, torch.float64 if dtype == torch.float64 else torch.float32)", "masks = (torch.bool,)"),
    ),
    (OPERANDS, MERGED_WEIGHT_BITS): (
        ("if merge is not None and lora_input is None:", "if merge is not None:"),
        ("torch.compiler.is_compiling() or weight.device.type", "weight.device.type"),
        ('weight.device.type != "cpu" or (weight.dtype, dtype) != _NARROWED', 'weight.device.type != "cpu"'),
        ("torch.is_grad_enabled() and (weight.requires_grad", "(weight.requires_grad"),
        ("(weight.requires_grad or lora_a.requires_grad or", "(lora_a.requires_grad or"),
        ("or lora_a.requires_grad or lora_b.requires_grad)", "or lora_b.requires_grad)"),
        ("or lora_a.requires_grad or lora_b.requires_grad)", "or lora_a.requires_grad)"),
        ("module.merged_weight(weight, lora_a, lora_b, scaling)", "weight.to(dtype)"),
        ("scaling), lora_a[:0], lora_b[:, :0]", "scaling), lora_a, lora_b"),
    ),
    (SHARED, ZERO_SIZES_MASKED_LINEAR): (("tensor.flatten(0, -2) if", "tensor.reshape(-1, tensor.shape[-1]) if"),),
    (SHARED, EVERY_OPERATION_CONSTANT): (("grad.detach().requires_grad_()", "grad"),),
    (SHARED, EVERY_OPERATION_IN_PLACE): (("rows.shape[-1]).detach()", "rows.shape[-1])"),),
    (TRITON_KERNELS, LINEAR_TRITON_EVERY_COMBINATION): (
        ("total = product(part, b, total, UPCAST, PRECISION)", "pass"),
        ("x_masked = (x.to(tl.float32) * in_mask[None, :]).to(x.dtype)", "x_masked = x"),
        ("adapter = (adapter.to(tl.float32) * in_mask[None, :]).to(x.dtype)", "adapter = adapter"),
        ("if MASK_LORA and in_mask_ptr is not None:", "if in_mask_ptr is not None:"),
        ("adapter = tl.load(l_ptrs, mask=x_ok, other=0.0)", "adapter = x"),
        ("if bias_ptr is not None:", "if False:"),
        ("s = (s_acc * scaling)", "s = (s_acc * 1.0)"),
        ("if s_ptr is not None and MASK_LORA:", "if False:"),
        ("if s_ptr is not None and MASK_LORA:", "if s_ptr is not None:"),
        ("if s_ptr is not None and not MASK_LORA:", "if False:"),
        ("if s_ptr is not None and not MASK_LORA:", "if s_ptr is not None:"),
        (
            "tl.store(sum_ptr + rows[:, None] * N + cols[None, :], acc.to(",
            "tl.store(sum_ptr + rows[:, None] * N + cols[None, :], (2 * acc).to(",
        ),
        ("tl.sum(other.to(tl.float32) * acc, axis=0)", "tl.sum(other.to(tl.float32), axis=0)"),
        ("if out_mask_ptr is not None:", "if False:"),
        ("x = (x.to(tl.float32) * mask[None, :]).to(x.dtype)", "x = x"),
        ("(acc * scaling).to(s_ptr", "acc.to(s_ptr"),
        ("tl.sum(g.to(tl.float32) * z.to(tl.float32), axis=0)", "tl.sum(g.to(tl.float32), axis=0)"),
        ("total += tl.sum(g.to(tl.float32), axis=0)", "total += 0"),
        ("if mask_ptr is not None:\n        total *=", "if False:\n        total *="),
    ),
    (TRITON_KERNELS, LINEAR_TRITON_COMBINATION_WITH): (
        ("total = tl.zeros_like(acc)", "pass"),
        ("total = acc + dropped_tile(total, rows, first_col, seed, THRESHOLD, SCALE)", "total = acc + total"),
        ("x = dropped_tile(x, rows, k, seed, THRESHOLD, SCALE)", "pass"),
        ("g = dropped_tile(g, rows, pid_c * BLOCK_C, seed, THRESHOLD, SCALE)", "pass"),
    ),
    (TRITON_KERNELS, LINEAR_TRITON_NOTHING_READ): (
        ("mask=col_ok[None, :] & (ranks < RANK)[:, None]", "mask=col_ok[None, :]"),
        (
            "x_ok = row_ok[:, None] & (ks < K - k)[None, :]\n            w_ok",
            "x_ok = row_ok[:, None]\n            w_ok",
        ),
        ("w_ok = col_ok[None, :] & (ks < K - k)[:, None]", "w_ok = col_ok[None, :]"),
        ("(in_mask_ptr + k + ks, mask=ks < K - k, other=0)", "(in_mask_ptr + k + ks)"),
        ("x_ok = row_ok[:, None] if EVEN_K else row_ok[:, None] & (ks < K - k)[None, :]", "x_ok = row_ok[:, None]"),
        ("g_ok = row_ok[:, None] & col_ok[None, :]", "g_ok = col_ok[None, :]"),
    ),
    (TRITON_KERNELS, LINEAR_TRITON_TILES_TABLE): (
        ("row_ok = rows < last", "row_ok = rows < M"),
        ("last = min(first + rows_per_split, M)", "last = M"),
        ("part_ptr += C * R", "part_ptr += 0"),
    ),
    (TRITON_KERNELS, LINEAR_TRITON_OFFSETS_PAST): (
        ("    if WIDE:\n        cols = cols.to(tl.int64)\n    first = split", "    first = split"),
    ),
    (TRITON, LINEAR_TRITON_EVERY_COMBINATION): (
        ("_down(adapter_input, lora_a, in_mask if mask_lora else None,", "_down(adapter_input, lora_a, None,"),
        ("_down(adapter_input, lora_a, in_mask if mask_lora else None,", "_down(adapter_input, lora_a, in_mask,"),
        ("out_mask, in_mask, y, config, mask_lora", "None, in_mask, y, config, mask_lora"),
        ("out_mask, in_mask, y, config, mask_lora", "out_mask, None, y, config, mask_lora"),
        ("bias=bias, total=total", "bias=None, total=total"),
        ("lora_out_mask = out_mask if mask_lora else None", "lora_out_mask = None"),
        ("lora_out_mask = out_mask if mask_lora else None", "lora_out_mask = out_mask"),
        ("factor_mask=lora_out_mask, sum_mask=out_mask", "factor_mask=None, sum_mask=out_mask"),
        ("factor_mask=lora_out_mask, sum_mask=out_mask", "factor_mask=lora_out_mask"),
        ("factor_mask=lora_in_mask, transpose=True", "transpose=True"),
        ("aten.mask_(d_weight, None if out_mask is None else out_mask.unsqueeze(1))", "pass"),
        ("aten.mask_(d_weight, in_mask)", "pass"),
        ("d_in += _reduce_rows(lora_input, z=d_adapter)[1]", "pass"),
        ("up, in_mask, out_mask, d_x, config", "up, None, out_mask, d_x, config"),
        ("up, in_mask, out_mask, d_x, config", "up, in_mask, None, d_x, config"),
        ("x if lora_input is None else lora_input\n            _lora_down", "x\n            _lora_down"),
        ("lora_in_mask = in_mask if mask_lora else None", "lora_in_mask = None"),
        ("lora_in_mask = in_mask if mask_lora else None", "lora_in_mask = in_mask"),
        (
            "_lora_down(grad_y, lora_b.t(), lora_out_mask, options.scaling, up)",
            "_lora_down(grad_y, lora_b.t(), lora_out_mask, 1.0, up)",
        ),
        (
            "_lora_down(grad_y, lora_b.t(), lora_out_mask, options.scaling, up)",
            "_lora_down(grad_y, lora_b.t(), None, options.scaling, up)",
        ),
        ("aten.mask_(d_adapter, lora_in_mask)", "pass"),
    ),
    (TRITON, LINEAR_TRITON_COMBINATION_WITH): (
        ("transpose=True, dropout=dropout", "transpose=True"),
        ("parts=parts, dropout=dropout", "parts=parts"),
        ("scaling, s, dropout)", "scaling, s)"),
    ),
    (TRITON, LINEAR_TRITON_HALF_PRECISION): (
        ("one_pass = config.one_pass and dropout is None", "one_pass = config.one_pass"),
    ),
    (TRITON, STRIDES_LINEAR_HARD_TRITON): (("return tensor.contiguous()", "return tensor"),),
    (TRITON, OFFSETS_VENDOR_GEMM): ((" and max(weight.shape) < LARGEST_STRIDE", ""),),
    (TRITON, LINEAR_TRITON_VENDOR_GEMM): (
        ("rows.shape[0] > 0 and weight.numel() > 0", "weight.numel() > 0"),
        ("rows.shape[0] > 0 and weight.numel() > 0", "rows.shape[0] > 0"),
    ),
    (TRITON, PRECISION): (
        ("allowed = x.dtype == torch.float32 and", "allowed ="),
        ("allowed and triton_runtime.takes_tf32(x.device)", "allowed"),
        ('torch.backends.cuda.matmul.fp32_precision == "tf32"', 'torch.get_float32_matmul_precision() != "highest"'),
    ),
    (TRITON, LINEAR_TRITON_OFFSETS_PAST): (
        (
            "passes_int32(x, weight, lora_b, lora_input, s, other, y)",
            "passes_int32(x, lora_b, lora_input, s, other, y)",
        ),
        (
            "passes_int32(x, weight, lora_b, lora_input, s, other, y)",
            "passes_int32(x, weight, lora_input, s, other, y)",
        ),
        ("passes_int32(x, weight, lora_b, lora_input, s, other, y)", "passes_int32(x, weight, lora_b, s, other, y)"),
        (
            "passes_int32(x, weight, lora_b, lora_input, s, other, y)",
            "passes_int32(x, weight, lora_b, lora_input, s, y)",
        ),
        ("WIDE=passes_int32(g, s, z)", "WIDE=False"),
    ),
    (TRITON, LINEAR_TRITON_WITHOUT_MASKS): (
        (
            "aten.forward(operands, options, primitives",
            "aten.forward(operands, options._replace(dropout=None), primitives",
        ),
        (
            "aten.backward(grad_y, saved, options, needs, primitives",
            "aten.backward(grad_y, saved, options._replace(dropout=None), needs, primitives",
        ),
    ),
    (DESCRIPTOR_KERNELS, DESCRIPTORS_EVERY_COMBINATION): (
        ("w_desc.load([k, col]) if W_BY_K else tl.trans(w_desc.load([col, k]))", "tl.trans(w_desc.load([col, k]))"),
        ("x = l_desc.load([row, k])", "pass"),
        ("s = (s_acc * scaling)", "s = (s_acc * 1.0)"),
        ("if bias_ptr is not None:", "if False:"),
        ("if s_ptr is not None and MASK_LORA:", "if False:"),
        ("if s_ptr is not None and MASK_LORA:", "if s_ptr is not None:"),
        ("if s_ptr is not None and not MASK_LORA:", "if False:"),
        ("if s_ptr is not None and not MASK_LORA:", "if s_ptr is not None:"),
        ("sum_desc.store([row, col], acc", "sum_desc.store([row, col], 2 * acc"),
        ("tl.sum(other.to(tl.float32) * acc, axis=0)", "tl.sum(other.to(tl.float32), axis=0)"),
        ("acc *= out_mask[None, :]", "pass"),
        (
            "range(tl.program_id(0), tiles_m * tiles_n, tl.num_programs(0))",
            "range(tl.program_id(0), tl.num_programs(0))",
        ),
        ("(rows < tl.where(tile_n == 0, M, 0))", "(rows < 0)"),
    ),
    (DESCRIPTOR_KERNELS, DESCRIPTORS_REMOVED): (
        ("range(tl.cdiv(end, BLOCK_K) * BLOCK_K, K, BLOCK_K)", "range(end, K, BLOCK_K)"),
        ("range(tl.cdiv(end, BLOCK_K) * BLOCK_K, K, BLOCK_K)", "range(K, K, BLOCK_K)"),
        ("mask=cols < base_n, other=0.0", "mask=col_ok, other=0.0"),
        ("if sum_desc is None and dot_ptr is None:", "if False:"),
        ("if sum_desc is None and dot_ptr is None:", "if True:"),
    ),
    (DESCRIPTORS, DESCRIPTORS_EVERY_COMBINATION): (
        ("        on_x = mask_lora\n", "        on_x = True\n"),
        ("        on_x = mask_lora\n", "        on_x = False\n"),
        ("lora_input = _times(lora_input, mask)", "pass"),
        ("return x, lines.t() if by_k else lines, lora_input", "return x, weight, lora_input"),
        ("return _times(x, mask), weight, lora_input", "return x, weight, lora_input"),
    ),
    (DESCRIPTORS, DESCRIPTORS_HALF_PRECISION): (
        ("mask.unsqueeze(1) if by_k else mask", "mask"),
        ("lines.t() if by_k else lines", "lines"),
    ),
    (DESCRIPTOR_KERNELS, DESCRIPTORS_KEPT_FIRST): (
        ("if l_desc is None else l_desc.load([row, k])", ""),
        ("bias_ptr + cols, mask=cols < base_n", "bias_ptr + cols, mask=cols < 0"),
    ),
    (DESCRIPTORS, DESCRIPTORS_ADDRESSED): (
        ("weight.stride(1) != 1 and weight.shape[1] > 1", "weight.stride(1) != 1"),
        ("0 < height < _SIDES", "height < _SIDES"),
        ("0 < height < _SIDES", "0 < height"),
        ("0 < width < _SIDES", "0 < width"),
        (" or matrix.data_ptr() % _ALIGNMENT", ""),
        ("if width > 1 and matrix.stride(1) != 1:", "if False:"),
        ("matrix.stride(0) if height > 1 else round_up(width, unit)", "matrix.stride(0)"),
        ("stride % unit == 0 and stride >= width", "stride >= width"),
        ("stride % unit == 0 and stride >= width", "stride % unit == 0"),
        (" and x.shape[0] > 1", ""),
        ("n * x.element_size() % _ALIGNMENT", "False"),
        ("lora_a.shape[0] > config.one_pass_rank", "False"),
        ("config.block_n > tiles.WIDEST_DOT", "False"),
        ("generation(x.device) not in config.archs", "False"),
        (" or torch.version.hip is not None", ""),
    ),
    (TILES, DESCRIPTORS_ENVIRONMENT): (
        ("if name not in known:", "if False:"),
        ("return descriptor_tiles(dtype).get(name)", "return None"),
        ("return descriptor_tiles(dtype).get(name)", "return known[name]"),
    ),
    (TRITON, DESCRIPTORS_DROPOUT): (("if dropout is not None or descriptors", "if descriptors"),),
    (NATIVE, MERGED_WEIGHT_BITS): (
        ("extension.ops.merged_weight(*held, scaling)", "extension.ops.merged_weight(*held, 1.0)"),
        ("tensor.detach().float().contiguous() for", "tensor.detach().float() for"),
    ),
    (CALL, MERGED_WEIGHT_BITS): (
        ("merge = float(scaling)", "merge = 1.0"),
        ("    elif mask_lora or (out_mask", "    if mask_lora or (out_mask"),
        ("mask_lora or (out_mask is None and in_mask is None)", "out_mask is None and in_mask is None"),
        ("mask_lora or (out_mask is None and in_mask is None)", "True"),
    ),
}
