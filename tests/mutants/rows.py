"""Broken lines of cross-entropy in place."""

from mutants.mutant import Table

DEFINITION = "atp_kernels/reference.py"
REFERENCE = "atp_kernels/backends/aten.py"
NATIVE = "atp_kernels/backends/native.py"

LOSS = "tests/atp_kernels/test_cross_entropy_kernel.py -k 'reference and few_units'"
LOSS_APART = "tests/atp_kernels/test_cross_entropy_kernel.py -k 'native and apart'"

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
}  # fmt: skip
