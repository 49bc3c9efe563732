"""Python of what goes over rows: cross-entropy, RMSNorm, and adapters that are merged into a weight."""

from mutants.mutant import Table

DEFINITION = "atp_kernels/reference.py"
REFERENCE = "atp_kernels/backends/reference.py"
NATIVE = "atp_kernels/backends/native.py"
CALL = "atp_kernels/functional.py"

LOSS = "tests/atp_kernels/test_cross_entropy_kernel.py -k 'reference and few_units'"
LOSS_APART = "tests/atp_kernels/test_cross_entropy_kernel.py -k 'native and apart'"
RMS = "tests/atp_kernels/test_rms_norm.py -k 'reference and no_worse'"
RMS_DTYPES = "tests/atp_kernels/test_rms_norm.py -k other_dtypes"
MERGED = "tests/atp_kernels/test_merged_weight.py -k 'not bits'"

TABLE: Table = {
    (DEFINITION, LOSS): (
        ("losses = -log_p.gather", "losses = log_p.gather"),
        ("log_p.new_full(index.shape, -1.0)", "log_p.new_full(index.shape, 1.0)"),
        ("log_p.exp_().scatter_add_(1, index, log_p.new_full(index.shape, -1.0))", "log_p.exp_()"),
        ("torch.log_softmax(_wide(logits), dim=1)", "_wide(logits)"),
        ("torch.log_softmax(_wide(logits), dim=1)", "torch.log_softmax(logits, dim=1).float()"),
    ),
    (DEFINITION, RMS): (
        ("wide.square().mean(-1, keepdim=True) + eps", "wide.square().mean(-1, keepdim=True)"),
        ("(weight * normed).to", "normed.to"),
    ),
    (DEFINITION, RMS_DTYPES): (
        ("wide.square().mean(-1, keepdim=True) + eps", "wide.square().sum(-1, keepdim=True) + eps"),
    ),
    (REFERENCE, LOSS): (("torch.cat([reference", "torch.cat([2 * reference"),),
    (REFERENCE, RMS): (
        ("(wide.square().mean(1) + eps).rsqrt()", "wide.square().mean(1).rsqrt()"),
        ("(wide.square().mean(1) + eps).rsqrt()", "(wide.square().sum(1) + eps).rsqrt()"),
        ("weight * (wide * scales.unsqueeze(1))", "wide * scales.unsqueeze(1)"),
        ("weight * (wide * scales.unsqueeze(1))", "weight * wide"),
        ("direct = d_y.to(scales.dtype) * weight", "direct = d_y.to(scales.dtype)"),
        ("(direct * wide).mean(1, keepdim=True)", "(direct * wide).sum(1, keepdim=True)"),
        ("mean(1, keepdim=True) * scale.square()", "mean(1, keepdim=True) * scale"),
        ("((direct - wide * pull) * scale)", "(direct * scale)"),
        ("((direct - wide * pull) * scale)", "(direct - wide * pull)"),
    ),
    ("atp_kernels/ops/rms_norm.py", RMS): (
        ("(grad_y.to(scales.dtype) * x * scales.unsqueeze(1))", "(grad_y.to(scales.dtype) * scales.unsqueeze(1))"),
        ("(grad_y.to(scales.dtype) * x * scales.unsqueeze(1))", "(grad_y.to(scales.dtype) * x)"),
    ),
    (NATIVE, LOSS_APART): (("if held is not logits:\n        logits.copy_(held)", "pass"),),
    (NATIVE, RMS_DTYPES): (
        ("if dtype != x.dtype and not narrow:", "if False:"),
        ("if d_y.dtype not in (torch.float32, torch.bfloat16):", "if False:"),
    ),
    (NATIVE, MERGED): (
        ("_ops.merged_weight(*held, scaling)", "_ops.merged_weight(*held, 1.0)"),
        ("tensor.detach().float().contiguous() for", "tensor.detach().float() for"),
    ),
    (CALL, MERGED): (
        ("merge=float(scaling), backend=backend)", "merge=1.0, backend=backend)"),
        ("dropout == 0 and (mask_lora or (out_mask", "(mask_lora or (out_mask"),
        ("(mask_lora or (out_mask is None and in_mask is None))", "(out_mask is None and in_mask is None)"),
        ("(mask_lora or (out_mask is None and in_mask is None))", "True"),
        ("mergeable = merge is not None and lora_input is None", "mergeable = merge is not None"),
        ("torch.compiler.is_compiling() or weight.device.type", "weight.device.type"),
        ("weight.device.type != \"cpu\" or (weight.dtype, dtype) != _NARROWED", "weight.device.type != \"cpu\""),
        ("torch.is_grad_enabled() and (weight.requires_grad", "(weight.requires_grad"),
        ("(weight.requires_grad or lora_a.requires_grad or", "(lora_a.requires_grad or"),
        ("or lora_a.requires_grad or lora_b.requires_grad)", "or lora_b.requires_grad)"),
        ("or lora_a.requires_grad or lora_b.requires_grad)", "or lora_a.requires_grad)"),
        ("module.merged_weight(weight, lora_a, lora_b, scaling)", "weight.to(dtype)"),
        ("scaling), lora_a[:0], lora_b[:, :0]", "scaling), lora_a, lora_b"),
    ),
    ("atp_kernels/blocks.py", MERGED): (
        ("merge=float(p.scaling) if alike else None,", "merge=1.0 if alike else None,"),
        ("merge=float(p.scaling) if alike else None,", "merge=float(p.scaling),"),
    ),
}  # fmt: skip
