"""Python of what goes over rows: cross-entropy, and adapters that are merged into a weight."""

from mutants.mutant import Table

DEFINITION = "atp_kernels/reference.py"
REFERENCE = "atp_kernels/backends/aten.py"
NATIVE = "atp_kernels/backends/native.py"
CALL = "atp_kernels/functional.py"

LOSS = "tests/atp_kernels/test_cross_entropy_kernel.py -k 'reference and few_units'"
LOSS_APART = "tests/atp_kernels/test_cross_entropy_kernel.py -k 'native and apart'"
MERGED = "tests/atp_kernels/test_merged_weight.py -k 'not bits'"

TABLE: Table = {
    (DEFINITION, LOSS): (
        ("losses = -log_p.gather", "losses = log_p.gather"),
        ("log_p.new_full(index.shape, -1.0)", "log_p.new_full(index.shape, 1.0)"),
        ("log_p.exp_().scatter_add_(1, index, log_p.new_full(index.shape, -1.0))", "log_p.exp_()"),
        ("torch.log_softmax(_wide(logits), dim=1)", "_wide(logits)"),
        ("torch.log_softmax(_wide(logits), dim=1)", "torch.log_softmax(logits, dim=1).float()"),
    ),
    (REFERENCE, LOSS): (("torch.cat([reference", "torch.cat([2 * reference"),),
    (NATIVE, LOSS_APART): (("if held is not logits:\n        logits.copy_(held)", "pass"),),
    (NATIVE, MERGED): (
        ("extension.ops.merged_weight(*held, scaling)", "extension.ops.merged_weight(*held, 1.0)"),
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
