"""Adapters that are merged into a weight, in Python."""

from mutants.mutant import Table

NATIVE = "atp_kernels/backends/native.py"
CALL = "atp_kernels/functional.py"

MERGED = "tests/atp_kernels/test_merged_weight.py -k 'not bits'"

TABLE: Table = {
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
