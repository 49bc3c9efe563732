"""The gated MLP and joint Q, K and V: what is masked, scaled and added once for several linears."""

from mutants.mutant import Table

DEFINITION = "atp_kernels/reference.py"
PRIMITIVES = "atp_kernels/backends/primitives.py"
NATIVE = "atp_kernels/backends/native.py"
SWIGLU = "atp_kernels/ops/swiglu.py"
BLOCKS = "atp_kernels/blocks.py"

MLP = "tests/atp_kernels/test_blocks.py -k swiglu_is_no_worse_than_unfused"
MLP_KEPT = "tests/atp_kernels/test_blocks.py -k swiglu_on_kept_slices_is_no_worse"
ACTIVATIONS = "tests/atp_kernels/test_native_activations.py -k 'any_shape or columns'"
JOINED = "tests/atp_kernels/test_backends_agree.py -k fit_together"
QKV = "tests/atp_kernels/test_blocks.py -k qkv_is_no_worse_than_unfused"

TABLE: Table = {
    (DEFINITION, MLP): (
        ("in_mask = None if mask_lora else mask", "in_mask = None"),
        ("masks=(mask, mask), mask_lora=mask_lora", "masks=(mask, None), mask_lora=mask_lora"),
        ("masks=(mask, mask), mask_lora=mask_lora", "masks=(mask, mask)"),
        ("act(g) * u, weight", "act(g), weight"),
        ("scaling=scaling, in_mask=in_mask, bias=bias)", "scaling=scaling, in_mask=in_mask)"),
        ("scaling=scaling, in_mask=in_mask, bias=bias)", "scaling=1.0, in_mask=in_mask, bias=bias)"),
    ),
    (PRIMITIVES, MLP): (
        ("[0](gate).mul_(up)", "[0](gate)"),
        ("forward(gate, out=d_up).mul_(d_h)", "forward(gate, out=d_up)"),
        ("backward(d_h.mul_(up), gate", "backward(d_h, gate"),
    ),
    (NATIVE, ACTIVATIONS): (
        ('if activation != "silu" or not _unit_stride(gate, up):', "if not _unit_stride(gate, up):"),
        ('if activation != "silu" or not _unit_stride(gate, up):', 'if activation != "silu":'),
        ("return extension.ops.swiglu_forward(gate, up)", "return extension.ops.swiglu_forward(up, gate)"),
        ('if activation != "silu" or not _unit_stride(d_h,', "if not _unit_stride(d_h,"),
        ("not _unit_stride(d_h, gate, up, d_gate, d_up):", "False:"),
        ("ops.swiglu_backward(d_h, gate, up, d_gate, d_up)", "ops.swiglu_backward(d_h, up, gate, d_gate, d_up)"),
    ),
    (SWIGLU, MLP): (
        ("(None, in_mask) if last else (out_mask, None)", "(None, None) if last else (out_mask, None)"),
        ("(None, in_mask) if last else (out_mask, None)", "(None, in_mask) if last else (None, None)"),
        ("masked(total, out_mask) if y is None else y", "total if y is None else y"),
        ("[d_h, torch.empty_like(d_h)]", "[torch.empty_like(d_h), d_h]"),
        ("term if total is None else total.add_(term)", "term"),
        ("masked_later = total is not None and spec.mask_lora", "masked_later = total is not None"),
    ),
    (SWIGLU, MLP_KEPT): (
        ("*self.kept.sides, self.scaling), None", "*self.kept.sides, 1.0), None"),
        ("(grad, *saved, self.scaling, True, wanted)", "(grad, *saved, 1.0, True, wanted)"),
        ("(grad, *saved, self.scaling, True, wanted)", "(grad, *saved, self.scaling, False, wanted)"),
        ("slices = self.kept.weight(x.dtype), self.kept.bias(x.dtype)", "slices = self.kept.weight(x.dtype), None"),
    ),
    (BLOCKS, MLP): (
        ("(hidden, None, None if mask_lora else mask)", "(hidden, None, None)"),
        ("mask if mask is None or stacked is None else mask.repeat(2)", "None"),
        ("p.lora_b, p.bias, None, *masks)", "p.lora_b, None, None, *masks)"),
    ),
    (BLOCKS, JOINED): (
        ("mask.shape == linear.weight.shape[:1] and mask.device == x.device", "mask.device == x.device"),
        ("mask.shape == linear.weight.shape[:1] and mask.device == x.device", "mask.shape == linear.weight.shape[:1]"),
        ("and lora_b.shape == (weight.shape[0], lora_a.shape[0])", "and len(lora_b) == len(weight)"),
        ("and lora_b.shape == (weight.shape[0], lora_a.shape[0])", "and lora_b.shape[1] == len(lora_a)"),
        ("and (bias is None or bias.shape == weight.shape[:1])", ""),
        ("and all(tensor.device == weight.device for tensor in small)", ""),
    ),
    (BLOCKS, QKV): (
        ("masks = torch.cat(masks)", "masks = None"),
        ('options = {"scaling": scaling, "bias": bias,', 'options = {"scaling": 1.0, "bias": bias,'),
        ('options = {"scaling": scaling, "bias": bias,', 'options = {"scaling": scaling, "bias": None,'),
        ("w.new_zeros(len(w)) if p.bias is None else p.bias", "w.new_zeros(len(w))"),
        ("lora_b, first.scaling, bias)", "lora_b, first.scaling)"),
        ("lora_b, first.scaling, bias)", "lora_b, 1.0, bias)"),
    ),
}  # fmt: skip
