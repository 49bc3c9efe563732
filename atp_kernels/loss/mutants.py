"""Broken lines of cross-entropy."""

DEFINITION, ATEN, NATIVE = (f"atp_kernels/loss/{name}.py" for name in ("definition", "aten", "native"))

LOSS = "tests/atp_kernels/test_cross_entropy_kernel.py -k 'reference and few_units'"
LOSS_APART = "tests/atp_kernels/test_cross_entropy_kernel.py -k 'native and apart'"

TABLE = {
    (DEFINITION, LOSS): (
        ("losses = -log_p.gather", "losses = log_p.gather"),
        ("log_p.new_full(index.shape, -1.0)", "log_p.new_full(index.shape, 1.0)"),
        ("log_p.exp_().scatter_add_(1, index, log_p.new_full(index.shape, -1.0))", "log_p.exp_()"),
        ("torch.log_softmax(logits.to(torch.promote_types(logits.dtype, torch.float32)), dim=1)", "logits.float()"),
        ("logits.to(torch.promote_types(logits.dtype, torch.float32)), dim=1)", "logits, dim=1).float()"),
    ),
    (ATEN, LOSS): (("torch.cat([definition", "torch.cat([2 * definition"),),
    (NATIVE, LOSS_APART): (("if held is not logits:\n        logits.copy_(held)", "pass"),),
}
