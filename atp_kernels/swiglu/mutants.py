"""Broken lines of the gated MLP."""

DEFINITION = "atp_kernels/swiglu/definition.py"
ATEN = "atp_kernels/swiglu/aten.py"
NATIVE = "atp_kernels/swiglu/native.py"
TRITON = "atp_kernels/swiglu/triton.py"
OP = "atp_kernels/swiglu/op.py"

BLOCKS_SWIGLU_NO_WORSE = "tests/atp_kernels/test_blocks.py -k swiglu_is_no_worse_than_unfused"
NATIVE_ACTIVATIONS_ANY_SHAPE = "tests/atp_kernels/test_native_activations.py -k 'any_shape or columns'"
BLOCKS_SWIGLU_ON_KEPT = "tests/atp_kernels/test_blocks_dropout.py -k swiglu_on_kept_slices_is_no_worse"
BLOCKS_DROPOUT = "tests/atp_kernels/test_blocks_dropout.py tests/atp_kernels/test_blocks.py -k 'swiglu or adapter'"
MERGED_WEIGHT_BITS = "tests/atp_kernels/test_merged_weight.py -k 'not bits'"

GATED = "tests/atp_kernels/test_gated_triton.py -k 'no_worse or every_row'"
GATED_AS_ELSEWHERE = "tests/atp_kernels/test_gated_triton.py -k other_backends"
GATED_LIMITS = "tests/atp_kernels/test_gated_triton.py -k 'limits or removed_channel'"
GATED_RANGE = "tests/atp_kernels/test_gated_triton.py -k over_the_range"
GATED_LAYOUT = "tests/atp_kernels/test_gated_triton.py -k layout"
GATED_FENCED = "tests/atp_kernels/test_gated_triton.py -k nothing_is_read"
GATED_FAR = "tests/atp_kernels/test_gated_triton.py -k two_to_the_31"

TABLE = {
    (DEFINITION, BLOCKS_SWIGLU_NO_WORSE): (
        ("in_mask = None if mask_lora else mask", "in_mask = None"),
        ("act(g) * u, weight", "act(g), weight"),
        ("scaling=scaling, in_mask=in_mask, bias=bias, ", "scaling=scaling, in_mask=in_mask, "),
        ("scaling=scaling, in_mask=in_mask, bias=bias, ", "scaling=1.0, in_mask=in_mask, bias=bias, "),
        ("out_mask=mask, mask_lora=mask_lora", "mask_lora=mask_lora"),
        ("out_mask=mask, mask_lora=mask_lora", "out_mask=mask"),
    ),
    (ATEN, BLOCKS_SWIGLU_NO_WORSE): (
        ("masked(gate, mask)).mul_(masked(up, mask))", "masked(gate, mask))"),
        ("masked(gate, mask)).mul_(masked(up, mask))", "masked(gate, mask)).mul_(up)"),
        ("masked(gate, mask)).mul_(masked(up, mask))", "gate).mul_(masked(up, mask))"),
        ("forward(masked_gate, out=d_up).mul_(d_h)", "forward(masked_gate, out=d_up)"),
        ("backward(d_h.mul_(masked(up, mask)), masked_gate", "backward(d_h, masked_gate"),
        ("column_dot(d_gate, gate).add_(column_dot(d_up, up))", "column_dot(d_gate, gate)"),
    ),
    (NATIVE, NATIVE_ACTIVATIONS_ANY_SHAPE): (
        ("if not _unit_stride(gate, up):", "if False:"),
        ("up, mask), activation == GELU)", "up, mask))"),
        ("swiglu_forward(masked(gate, mask), masked(up, mask)", "swiglu_forward(masked(up, mask), masked(gate, mask)"),
        ("d_up, sums, gelu)", "d_up, sums)"),
        ("not _unit_stride(d_h, gate, up, d_gate, d_up):", "False:"),
        ("(d_h, masked(gate, mask), masked(up, mask), d_gate", "(d_h, masked(up, mask), masked(gate, mask), d_gate"),
    ),
    (ATEN, GATED_AS_ELSEWHERE): (
        ("mask_(d_gate, mask)", "pass"),
        ("mask_(d_up, mask)", "pass"),
    ),
    (NATIVE, GATED_AS_ELSEWHERE): (
        ("mask_(d_gate, mask)", "pass"),
        ("mask_(d_up, mask)", "pass"),
        ("column_dot(d_gate, gate).add_(column_dot(d_up, up))", "column_dot(d_up, up)"),
        ("mask is None or (d_gate.is_contiguous() and d_up.is_contiguous())", "True"),
    ),
    (TRITON, GATED): (
        ("gate = _masked(gate, mask)\n        up", "up"),
        ("up = _masked(up, mask)\n    value", "up = up\n    value"),
        ("(value * up).to(", "value.to("),
        ("masked_gate = _masked(gate, mask)", "masked_gate = gate"),
        ("masked_up = _masked(up, mask)", "masked_up = up"),
        ("d_gate = d_h * masked_up * slope", "d_gate = d_h * slope"),
        ("d_up = d_h * value", "d_up = value"),
        ("sums += d_gate * gate + d_up * up", "sums += d_gate * gate"),
        ("sums += d_gate * gate + d_up * up", "sums = d_gate * gate + d_up * up"),
        ("d_gate = _masked(d_gate, mask)", "pass"),
        ("d_up = _masked(d_up, mask)", "pass"),
        ("part_ptr + pid * N + cols", "part_ptr + cols"),
        ("z_slope = 1.5957691216057308 * (1.0 + 0.134145 * inner * inner)", "z_slope = 1.0"),
        ("rows_per_program\n    last", "BLOCK_M\n    last"),
    ),
    (TRITON, GATED_LIMITS): (
        ("cut = tl.where(x < -SATURATED, -SATURATED, x)", "cut = x"),
        ("inner = tl.where(cut > SATURATED, SATURATED, cut)", "inner = cut"),
        ("tl.where(mask == 0, 0.0, values * mask)", "values * mask"),
    ),
    (TRITON, GATED_RANGE): (("rest = tl.where(z < 0, 1.0, power) * inverse", "rest = 1.0 - sigmoid"),),
    (TRITON, GATED_LAYOUT): (
        ("return matrix if matrix.stride(1) == 1 else matrix.contiguous()", "return matrix"),
        ("else mask).contiguous()", "else mask)"),
        ("            grad.copy_(copy)", "            pass"),
    ),
    (TRITON, GATED_FENCED): (
        ("ok = (rows < M)[:, None] & (cols < N)[None, :]", "ok = (rows < M)[:, None]"),
        ("ok = (rows < last) & col_ok[None, :]", "ok = rows < last"),
    ),
    (TRITON, GATED_FAR): (
        ("(tl.program_id(0) // blocks).to(tl.int64) * BLOCK_M", "(tl.program_id(0) // blocks) * BLOCK_M"),
        ("tl.arange(0, BLOCK_M).to(tl.int64)[:, None]", "tl.arange(0, BLOCK_M)[:, None]"),
    ),
    (OP, BLOCKS_SWIGLU_NO_WORSE): (
        ("base_mask = None if spec.mask_lora else out_mask", "base_mask = out_mask"),
        ("base_mask = None if spec.mask_lora else out_mask", "base_mask = None"),
        ("need_base = need_out and not spec.mask_lora", "need_base = False"),
        ("*grads, sum_mask, need_sum,", "*grads, None, need_sum,"),
        ("for value, _, _ in results), sum_mask)", "for value, _, _ in results), None)"),
        ("gate, up, sum_mask) if need_h", "gate, up) if need_h"),
        ("[d_h, torch.empty_like(d_h)]", "[torch.empty_like(d_h), d_h]"),
        ("term if total is None else total.add_(term)", "term"),
        ("(base_mask, None), (base_mask, None), (None, in_mask)", "(base_mask, None), (base_mask, None), (None, None)"),
        ("(base_mask, None), (base_mask, None), (None, in_mask)", "(base_mask, None), (None, None), (None, in_mask)"),
        ("(None, None, None if mask_lora else mask)", "(None, None, None)"),
        ("p.lora_b, p.bias, out_mask", "p.lora_b, None, out_mask"),
    ),
    (OP, BLOCKS_SWIGLU_ON_KEPT): (
        ("slices = self.kept.weight(x.dtype), self.kept.bias(x.dtype)", "slices = self.kept.weight(x.dtype), None"),
        ("adapter_input, *self.kept.sides, self.scaling)", "adapter_input, *self.kept.sides, 1.0)"),
        ("x, s, *self.kept.sides, self.scaling)", "x, s, *self.kept.sides, 1.0)"),
        ("needs[3], apart and needs[0], not apart)", "needs[3], apart and needs[0], False)"),
    ),
    (OP, MERGED_WEIGHT_BITS): (
        ("merge=float(p.scaling) if alike and not dropout", "merge=1.0 if alike and not dropout"),
        ("merge=float(p.scaling) if alike and not dropout else None,", "merge=float(p.scaling),"),
    ),
    (OP, BLOCKS_DROPOUT): (
        ("if alike and not dropout else None,", "if alike else None,"),
        ("seeds[1], backend)", "seeds[0], backend)"),
        ("None if drop_h is None else drop_h(h))", "None)"),
        ("dropped = drop_h(h) if drop_h is not None and needs[-3] else None", "dropped = h"),
        ("d_h.add_(drop_h(d_dropped))", "d_h.add_(d_dropped)"),
        ("alone, *options, drop_x)", "alone, *options)"),
        ("dropped = drop_x(x) if producers", "dropped = x if producers"),
        ("_sum(d_dropped, found[7])", "found[7]"),
        ("d_x.add_(drop_x(d_dropped))", "d_x.add_(d_dropped)"),
        ("seeds = held(drop_x), held(drop_h)", "seeds = None, held(drop_h)"),
        ("seeds = held(drop_x), held(drop_h)", "seeds = held(drop_x), None"),
    ),
}
