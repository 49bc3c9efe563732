"""Broken lines of the gated MLP."""

DEFINITION = "atp_kernels/swiglu/definition.py"
ATEN = "atp_kernels/swiglu/aten.py"
NATIVE = "atp_kernels/swiglu/native.py"
OP = "atp_kernels/swiglu/op.py"

BLOCKS_SWIGLU_NO_WORSE = "tests/atp_kernels/test_blocks.py -k swiglu_is_no_worse_than_unfused"
NATIVE_ACTIVATIONS_ANY_SHAPE = "tests/atp_kernels/test_native_activations.py -k 'any_shape or columns'"
BLOCKS_SWIGLU_ON_KEPT = "tests/atp_kernels/test_blocks.py -k swiglu_on_kept_slices_is_no_worse"
MERGED_WEIGHT_BITS = "tests/atp_kernels/test_merged_weight.py -k 'not bits'"

TABLE = {
    (DEFINITION, BLOCKS_SWIGLU_NO_WORSE): (
        ("in_mask = None if mask_lora else mask", "in_mask = None"),
        ("act(g) * u, weight", "act(g), weight"),
        ("scaling=scaling, in_mask=in_mask, bias=bias)", "scaling=scaling, in_mask=in_mask)"),
        ("scaling=scaling, in_mask=in_mask, bias=bias)", "scaling=1.0, in_mask=in_mask, bias=bias)"),
        ("out_mask=mask, mask_lora=mask_lora", "mask_lora=mask_lora"),
        ("out_mask=mask, mask_lora=mask_lora", "out_mask=mask"),
    ),
    (ATEN, BLOCKS_SWIGLU_NO_WORSE): (
        ("[0](gate).mul_(up)", "[0](gate)"),
        ("forward(gate, out=d_up).mul_(d_h)", "forward(gate, out=d_up)"),
        ("backward(d_h.mul_(up), gate", "backward(d_h, gate"),
    ),
    (NATIVE, NATIVE_ACTIVATIONS_ANY_SHAPE): (
        ('if activation != "silu" or not _unit_stride(gate, up):', "if not _unit_stride(gate, up):"),
        ('if activation != "silu" or not _unit_stride(gate, up):', 'if activation != "silu":'),
        ("return extension.ops.swiglu_forward(gate, up)", "return extension.ops.swiglu_forward(up, gate)"),
        ('if activation != "silu" or not _unit_stride(d_h,', "if not _unit_stride(d_h,"),
        ("not _unit_stride(d_h, gate, up, d_gate, d_up):", "False:"),
        ("ops.swiglu_backward(d_h, gate, up, d_gate, d_up)", "ops.swiglu_backward(d_h, up, gate, d_gate, d_up)"),
    ),
    (OP, BLOCKS_SWIGLU_NO_WORSE): (
        ("masked(total, out_mask) if y is None else y", "total if y is None else y"),
        ("[d_h, torch.empty_like(d_h)]", "[torch.empty_like(d_h), d_h]"),
        ("term if total is None else total.add_(term)", "term"),
        ("masked_later = total is not None and spec.mask_lora", "masked_later = total is not None"),
        ("(out_mask, None), (out_mask, None), (None, in_mask)", "(out_mask, None), (out_mask, None), (None, None)"),
        ("(out_mask, None), (out_mask, None), (None, in_mask)", "(out_mask, None), (None, None), (None, in_mask)"),
        ("(None, None, None if mask_lora else mask)", "(None, None, None)"),
        ("(mask, mask, None)", "(mask, None, None)"),
        ("p.lora_b, p.bias, out_mask", "p.lora_b, None, out_mask"),
    ),
    (OP, BLOCKS_SWIGLU_ON_KEPT): (
        ("slices = self.kept.weight(x.dtype), self.kept.bias(x.dtype)", "slices = self.kept.weight(x.dtype), None"),
        ("None, *self.kept.sides, self.scaling)", "None, *self.kept.sides, 1.0)"),
        ("x, s, *self.kept.sides, self.scaling)", "x, s, *self.kept.sides, 1.0)"),
        ("Needs(needs[0], needs[2], needs[3], False)", "Needs(needs[0], needs[2], needs[3], False, False)"),
    ),
    (OP, MERGED_WEIGHT_BITS): (
        ("merge=float(p.scaling) if alike else None,", "merge=1.0 if alike else None,"),
        ("merge=float(p.scaling) if alike else None,", "merge=float(p.scaling),"),
    ),
}
