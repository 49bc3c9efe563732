"""Broken lines of cross-entropy."""

DEFINITION, ATEN, NATIVE, TRITON = (
    f"atp_kernels/loss/{name}.py" for name in ("definition", "aten", "native", "triton")
)

LOSS = "tests/atp_kernels/test_cross_entropy_kernel.py -k 'reference and few_units'"
LOSS_APART = "tests/atp_kernels/test_strides.py -k 'cross_entropy and native'"
BLOCKS = "tests/atp_kernels/test_cross_entropy_kernel.py -k any_number_of_blocks"
TRITON_LIMITS = "tests/atp_kernels/test_cross_entropy_kernel.py -k 'triton and limits'"
TRITON_APART = "tests/atp_kernels/test_strides.py -k 'cross_entropy and triton'"
TRITON_SHIFT = "tests/atp_kernels/test_cross_entropy_kernel.py -k 'triton and shift'"
SPOILS = "tests/atp_kernels/test_cross_entropy_kernel.py -k spoils"
FAR = "tests/atp_kernels/test_offsets.py -k 'cross_entropy and triton'"

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
    (TRITON, BLOCKS): (
        ("sums * apart + 1, sums + apart)", "sums + 1, sums + apart)"),
        ("sums * apart + 1, sums + apart)", "sums * apart, sums + apart)"),
        ("sums * apart + 1, sums + apart)", "sums * apart + 1, sums)"),
        ("tl.exp(-tl.abs(z - largest))", "tl.exp(-tl.abs(z))"),
        ("largest = tl.where(higher, z, largest)", "largest = z"),
        ("sums * tl.exp(largest - top)", "sums"),
        ("/ total - (cols == target)", "- (cols == target)"),
        (" - (cols == target).to(tl.float32)", ""),
        ("tl.log(total) + (top - at_target)", "tl.log(total) - at_target"),
        ('other=-float("inf")', "other=0.0"),
        (
            "slope.to(logits_ptr.dtype.element_ty), mask=cols < V",
            "slope.to(logits_ptr.dtype.element_ty), mask=cols < 1",
        ),
    ),
    (TRITON, TRITON_LIMITS): (
        ("tl.full((BLOCK,), _LOWEST, dtype=tl.float32)", 'tl.full((BLOCK,), -float("inf"), dtype=tl.float32)'),
    ),
    (TRITON, TRITON_SHIFT): (("V) - top) / total", "V)) / total"),),
    (TRITON, TRITON_APART): (
        ("if held is not logits:\n        logits.copy_(held)", "pass"),
        ("row * stride_t", "row"),
        ("row * stride_zm", "row * V"),
    ),
    (TRITON, SPOILS): (('mask=(target >= 0) & (target < V), other=float("nan")', "mask=target < V, other=0.0"),),
    (TRITON, FAR): (("row = tl.program_id(0).to(tl.int64)", "row = tl.program_id(0)"),),
}
