"""Broken lines of RMSNorm."""

CALL, DEFINITION, OP, ATEN, NATIVE, TRITON = (
    f"atp_kernels/norm/{name}.py" for name in ("__init__", "definition", "op", "aten", "native", "triton")
)

RMS = "tests/atp_kernels/test_rms_norm.py -k 'reference and no_worse'"
RMS_DEFINED = "tests/atp_kernels/test_rms_norm.py -k torchs_own"
RMS_DTYPES = "tests/atp_kernels/test_rms_norm.py -k other_dtypes"
KERNELS = "tests/atp_kernels/test_norm_triton.py -k 'no_worse or every_row'"
ALONE = "tests/atp_kernels/test_norm_triton.py -k alone"
SUM_BITS = "tests/atp_kernels/test_rms_norm.py -k steps"
SUM_ALONE = "tests/atp_kernels/test_passes.py -k 'alone and add_rms_norm'"
SUM_BAD = "tests/atp_kernels/test_rms_norm.py -k 'does_not_fit'"
SUM_KERNELS = "tests/atp_kernels/test_norm_triton.py -k 'sum'"
FENCED = "tests/atp_kernels/test_norm_triton.py -k nothing_is_read"
STRIDED = "tests/atp_kernels/test_strides.py -k 'rms_norm and triton'"
FAR = "tests/atp_kernels/test_offsets.py -k 'rms_norm and triton'"

TABLE = {
    (DEFINITION, RMS_DEFINED): (
        ("wide.square().mean(-1, keepdim=True) + eps", "wide.square().mean(-1, keepdim=True)"),
        ("wide.square().mean(-1, keepdim=True) + eps", "wide.square().sum(-1, keepdim=True) + eps"),
        ("(weight * normed).to", "normed.to"),
        ("output if multiplier == 1 else output * multiplier", "output"),
        ("stream = added(x, output, multiplier)", "stream = added(x, output, 1.0)"),
    ),
    (ATEN, RMS): (
        ("(wide.square().mean(1) + eps).rsqrt()", "wide.square().mean(1).rsqrt()"),
        ("(wide.square().mean(1) + eps).rsqrt()", "(wide.square().sum(1) + eps).rsqrt()"),
        ("weight * (wide * scales.unsqueeze(1))", "wide * scales.unsqueeze(1)"),
        ("weight * (wide * scales.unsqueeze(1))", "weight * wide"),
        ("direct = d_y.to(scales.dtype) * weight", "direct = d_y.to(scales.dtype)"),
        ("(direct * wide).mean(1, keepdim=True)", "(direct * wide).sum(1, keepdim=True)"),
        ("mean(1, keepdim=True) * scale.square()", "mean(1, keepdim=True) * scale"),
        ("((direct - wide * pull) * scale)", "(direct * scale)"),
        ("((direct - wide * pull) * scale)", "(direct - wide * pull)"),
        ("(d_y.to(scales.dtype) * x * scales.unsqueeze(1))", "(d_y.to(scales.dtype) * scales.unsqueeze(1))"),
        ("(d_y.to(scales.dtype) * x * scales.unsqueeze(1))", "(d_y.to(scales.dtype) * x)"),
    ),
    (OP, RMS_DTYPES): (("backend, result=dtype)", "backend)"),),
    (NATIVE, RMS_DTYPES): (("if call.result is not None and call.result not in extension.DTYPES:", "if False:"),),
    (NATIVE, "tests/atp_kernels/test_rms_norm.py -k 'native and no_worse'"): (
        ("x if dtype == torch.bfloat16 else x.to(dtype)", "x"),
    ),
    (TRITON, "tests/atp_kernels/test_norm_triton.py -k cuda_takes"): (
        ("if call.result is not None and call.result not in triton_runtime.DTYPES:", "if False:"),
    ),
    (TRITON, KERNELS): (
        ("squares = x * x", "squares = x"),
        ("squares += rest * rest", "pass"),
        ("tl.sum(squares, axis=1) / K + eps", "tl.sum(squares, axis=1) / K"),
        ("tl.sum(squares, axis=1) / K + eps", "tl.sum(squares, axis=1) + eps"),
        ("x * scale * _load_weight(weight_ptr, cols, K)", "x * scale"),
        ("start + cols, K, multiplier) * scale", "start + cols, K, multiplier)"),
        ("rest * _load_weight(weight_ptr, start + cols, K))", "rest)"),
        ("products = d_y * weight * x", "products = d_y * x"),
        ("products += g * _load(x_rows, row_ok, start + cols, K)", "pass"),
        ("* scale / K * scale)[:, None]", "* scale / K)[:, None]"),
        ("* scale / K * scale)[:, None]", "* scale * scale)[:, None]"),
        ("(d_y * weight - x * pull) * scale", "(d_y * weight) * scale"),
        ("(d_y * weight - x * pull) * scale", "(d_y - x * pull) * scale"),
        ("(d_y * weight - x * pull) * scale", "d_y * weight - x * pull"),
        ("(g - rest * pull) * scale", "g * scale"),
        ("(g - rest * pull) * scale", "g - rest * pull"),
        ("sums += d_y * (x * scale)", "sums += d_y * x"),
        ("sums += d_y * (x * scale)", "sums = d_y * (x * scale)"),
        ("row_ok, cols, K) * (x * scale)", "row_ok, cols, K) * x"),
        ("sums += _load(d_y_ptr", "sums = _load(d_y_ptr"),
        ("part_ptr + tl.program_id(0) * K + cols", "part_ptr + cols"),
        ("part_ptr + tl.program_id(1) * K + cols", "part_ptr + cols"),
        ("triton.cdiv(triton.cdiv(rows, programs), block_m) * block_m", "rows // programs // block_m * block_m"),
        ('"WHOLE": width <= tile.block_k', '"WHOLE": True'),
        ("need_weight and x.shape[1] <= tile.block_k", "need_weight"),
    ),
    (TRITON, ALONE): (("if need_weight and parts is None:", "if parts is None:"),),
    (OP, SUM_BITS): (
        ("ctx.output_dtype == stream.dtype and ctx.multiplier == 1", "ctx.output_dtype == stream.dtype"),
        ("aten.output_grad(d_sum, output, ctx.multiplier)", "aten.output_grad(d_sum, output, 1.0)"),
    ),
    (OP, SUM_ALONE): (("need_x or need_output, output", "need_x, output"),),
    (ATEN, SUM_BITS): (
        ("stream = added(x, output, multiplier)", "stream = added(x, output, 1.0)"),
        ("        d_sum += d_stream\n", "        pass\n"),
        ("narrow if multiplier == 1 else narrow * multiplier", "narrow"),
        ("narrow = d_sum.to(output)", "narrow = d_sum"),
    ),
    (CALL, SUM_BAD): (
        ("output.shape != x.shape or not output", "not output"),
        ("or not output.is_floating_point() or output.device", "or output.device"),
        (" or output.device != x.device:", ":"),
        ("if not math.isfinite(multiplier):", "if False:"),
    ),
    (TRITON, SUM_KERNELS): (
        ("x += _load(output_rows, row_ok, cols, K) * multiplier", "x += _load(output_rows, row_ok, cols, K)"),
        ("x = x.to(stream_rows.dtype.element_ty).to(tl.float32)", "pass"),
        ("values += _load(d_stream_rows, row_ok, cols, K)", "pass"),
        (
            "_store(d_output_rows, row_ok, cols, K, values * multiplier)",
            "_store(d_output_rows, row_ok, cols, K, values)",
        ),
        ("            _store(stream_rows, row_ok, start + cols, K, rest)", "            pass"),
        ("_unit_stride(output), stream", "output, stream"),
        ("None if d_stream is None else _unit_stride(d_stream)", "d_stream"),
    ),
    (TRITON, FENCED): (
        ("ok = row_ok[:, None] & (cols < K)[None, :]\n    return", "ok = row_ok[:, None]\n    return"),
        ("ok = row_ok[:, None] & (cols < K)[None, :]\n    tl.store", "ok = row_ok[:, None]\n    tl.store"),
        ("weight_ptr + cols, mask=cols < K, other=0.0", "weight_ptr + cols"),
    ),
    (TRITON, STRIDED): (
        ("return matrix if matrix.stride(1) == 1 else matrix.contiguous()", "return matrix"),
        ("x, output, weight.contiguous(), stream", "x, output, weight, stream"),
        ("d_y, x, weight.contiguous(), scales", "d_y, x, weight, scales"),
    ),
    (TRITON, FAR): (("rows = tl.program_id(0).to(tl.int64) * BLOCK_M", "rows = tl.program_id(0) * BLOCK_M"),),
}
