"""Broken lines of the gradients of a mask that nobody applies."""

OP, ATEN, NATIVE, CHECKS = (f"atp_kernels/mask_gradient/{name}.py" for name in ("op", "aten", "native", "__init__"))
SWIGLU, GATED = "atp_kernels/swiglu/op.py", "atp_kernels/swiglu/triton.py"

TESTS = "tests/atp_kernels/test_mask_gradient.py"
SUMS = f"{TESTS} -k sums_are"
BLOCK = f"{TESTS} -k gated"
REFUSED = f"{TESTS} -k refused"

TABLE = {
    (OP, SUMS): (
        ("ctx.module.add_dots(matrix(grad), matrix(y), ctx.sums)", "pass"),
        ("return None, None, grad", "return None, None, 2 * grad"),
    ),
    (ATEN, SUMS): (
        ("total += column_dot(some, others)", "total.copy_(column_dot(some, others))"),
        ("sums += (left.to(wide) * right)", "sums[:] = (left.to(wide) * right)"),
        ("(len(sums), each)).sum(1)", "(each, len(sums))).sum(0)"),
    ),
    (NATIVE, SUMS): (
        ("left.dtype == right.dtype", "True"),
        ("sums.stride(1) == 1 and", "True and"),
        ("sums.dtype == torch.float32 and", "True and"),
    ),
    (CHECKS, REFUSED): (
        ("if sums.shape != (y.shape[0], y.shape[-1]):", "if False:"),
        ("or sums.requires_grad", ""),
        ("if sums.device != like.device:", "if False:"),
    ),
    (SWIGLU, BLOCK): (("need_sum, spec.sums)", "need_sum, None)"),),
    (GATED, BLOCK): (
        ("(pid // programs + 1).to(tl.int64) * M", "M + 0 * pid"),
        ("sums += parts.sum(1)", "sums.copy_(parts.sum(1))"),
    ),
}
