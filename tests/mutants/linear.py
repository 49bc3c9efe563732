"""The masked LoRA linear: its definition, the composed calls, the checks of a call and dropout."""

from mutants.mutant import Table

DEFINITION = "atp_kernels/reference.py"
REFERENCE = "atp_kernels/backends/aten.py"
PRIMITIVES = "atp_kernels/backends/primitives.py"
OPS = "atp_kernels/ops/linear.py"
PLAIN_MATH = "atp_kernels/ops/plain.py"
CALL = "atp_kernels/functional.py"

LINEAR = "tests/atp_kernels/test_linear.py -k no_worse_than_unfused"
PLAIN = "tests/atp_kernels/test_plain.py -k no_worse_than_unfused"
QUICK = "tests/atp_kernels/test_plain.py -k quick_checks"
NORMS = "tests/atp_kernels/test_linear.py -k gradcheck"
DRAWN = "tests/atp_kernels/test_linear_dropout.py -k 'published or definition or blocks or given'"

TABLE: Table = {
    (DEFINITION, LINEAR): (
        ("Dropout(p, int(seed)) if p else None", "None"),
        ("adapter_input = _masked(adapter_input, in_mask)", "pass"),
        ("base = _masked(x, in_mask) @ weight.T", "base = x @ weight.T"),
        ("base = base + bias", "pass"),
        ("adapter = scaling * (", "adapter = ("),
        ("_masked(base + adapter, out_mask) if mask_lora", "base + adapter if mask_lora"),
        ("else _masked(base, out_mask) + adapter", "else base + adapter"),
        ("else (values * mask).to(values.dtype)", "else values"),
        ("lora_input = dropped(x.reshape(-1, x.shape[-1]), dropout).view(x.shape)", "pass"),
    ),
    (DEFINITION, DRAWN): (
        ("PHILOX_ROUNDS = 7", "PHILOX_ROUNDS = 6"),
        ("return int(self.p * 2**32)", "return int(self.p * 2**31)"),
        ("return 1 / (1 - self.p)", "return 1.0"),
        ("self.seed >> 32 & _UINT32", "0"),
        ("torch.arange(first_row, first_row + rows,", "torch.arange(0, rows,"),
        ("^ c1 ^ k0", "^ c1"),
        ("^ c3 ^ k1", "^ c3"),
        ("torch.where(keep, values * dropout.scale, 0)", "values * dropout.scale"),
    ),
    (DEFINITION, NORMS): (
        ("_wide(lora_b).square().sum(1)", "_wide(lora_b).abs().sum(1)"),
        ("_wide(lora_a).square().sum(0)", "_wide(lora_a).abs().sum(0)"),
    ),
    (REFERENCE, LINEAR): (
        ("base_input = primitives.masked(x, in_mask)", "base_input = x"),
        ("adapter_input = base_input", "adapter_input = x"),
        ("if mask_lora and lora_input is None and dropout is None:", "if lora_input is None and dropout is None:"),
        ("if mask_lora and lora_input is None and dropout is None:", "if mask_lora and lora_input is None:"),
        ("primitives.mask_(primitives.dropped(x, dropout), mask)", "primitives.dropped(x, dropout)"),
        ("primitives.mask_(primitives.dropped(x, dropout), mask)", "primitives.masked(x, mask)"),
        ("d_x += primitives.dropped(up @ lora_a, dropout)", "d_x += up @ lora_a"),
        ("lora_input, in_mask if mask_lora else None,", "lora_input, None,"),
        ("lora_input, in_mask if mask_lora else None,", "lora_input, in_mask,"),
        ("scaled_mm(adapter_input, lora_a.t(), scaling)", "scaled_mm(adapter_input, lora_a.t(), 1.0)"),
        ("base_input @ weight.t() if bias is None else torch.addmm(bias,", "torch.addmm(x.new_zeros(()),"),
        ("if mask_lora:\n        add_product_(total,", "if True:\n        add_product_(total,"),
        ("if mask_lora:\n        add_product_(total,", "if False:\n        add_product_(total,"),
        ("primitives.masked(total, out_mask) if keep_sum", "total if keep_sum"),
        ("if keep_sum else primitives.mask_(total, out_mask)", "if keep_sum else total"),
        ("if not mask_lora:\n        add_product_(y,", "if True:\n        add_product_(y,"),
        ("if not mask_lora:\n        add_product_(y,", "if False:\n        add_product_(y,"),
        ("factor_norms(lora_a, lora_b) if with_norms", "factor_norms(2 * lora_a, lora_b) if with_norms"),
        ("factor_norms(lora_a, lora_b) if with_norms", "factor_norms(lora_a, 2 * lora_b) if with_norms"),
        ("lora_in_mask = in_mask if mask_lora else None", "lora_in_mask = None"),
        ("lora_in_mask = in_mask if mask_lora else None", "lora_in_mask = in_mask"),
        ("grad_base = primitives.masked(grad_y, out_mask)", "grad_base = grad_y"),
        ("grad_lora = grad_base if mask_lora else grad_y", "grad_lora = grad_y"),
        ("grad_lora = grad_base if mask_lora else grad_y", "grad_lora = grad_base"),
        ("mask_and_dot(grad_y, total, out_mask)", "mask_and_dot(grad_y, grad_y, out_mask)"),
        ("d_bias = grad_base.sum(0)", "d_bias = grad_y.sum(0)"),
        ("grad_base.t() @ primitives.masked(x, in_mask)", "grad_base.t() @ x"),
        ("grad_base.t() @ primitives.masked(x, in_mask)", "grad_y.t() @ primitives.masked(x, in_mask)"),
        ("d_b = grad_lora.t() @ down", "d_b = grad_base.t() @ down"),
        ("scaled_mm(grad_lora, lora_b, scaling)", "scaled_mm(grad_lora, lora_b, 1.0)"),
        ("d_x = grad_base @ weight", "d_x = grad_y @ weight"),
        ("elif need_adapter and mask_lora:", "elif False:"),
        ("if mask_lora and not shared_input:", "if False:"),
        ("primitives.mask_(d_x, in_mask)", "pass"),
        ("if shared_input and not mask_lora:", "if shared_input:"),
        ("if shared_input and not mask_lora:", "if False:"),
        ("primitives.mask_(d_adapter, lora_in_mask)", "pass"),
        ("primitives.masked(x if lora_input is None else lora_input, mask)", "x if lora_input is None else lora_input"),
        ("primitives.masked(x if lora_input is None else lora_input, mask)", "primitives.masked(x, mask)"),
    ),
    (PRIMITIVES, LINEAR): (
        ("if scaling == 1:", "if True:"),
        ("beta=0, alpha=scaling", "beta=0"),
        ("torch.mul(source, mask, out=target)", "target.copy_(source)"),
        ("block.mul_(mask)", "pass"),
        ("return total.addmm_(left, right) if left.shape[1] else total", "return total"),
        ("(some.to(total.dtype) * others)", "some.to(total.dtype)"),
        ("return masked(grad, mask), column_dot", "return grad, column_dot"),
    ),
    (PRIMITIVES, DRAWN): (
        ("reference.dropped(values[rows], dropout, first)", "reference.dropped(values[rows], dropout)"),
    ),
    (OPS, LINEAR): (
        ("(2 * grad_cols * lora_a)", "(grad_cols * lora_a)"),
        ("(2 * grad_rows.unsqueeze(1) * lora_b)", "(grad_rows.unsqueeze(1) * lora_b)"),
        ("keep_sum = out_mask is not None and out_mask.requires_grad", "keep_sum = False"),
    ),
    (REFERENCE, "tests/atp_kernels/test_linear.py -k compiled_operator"): (
        ("d_x if need_x else None", "d_x"),
        ("d_adapter if need_lora_input else None", "d_adapter"),
    ),
    (PLAIN_MATH, PLAIN): (
        ("scaled_mm(rows, lora_a.t(), scaling)", "scaled_mm(rows, lora_a.t(), 1.0)"),
        ("if bias is None else torch.addmm(bias,", "if True else torch.addmm(bias,"),
        ("add_product_(y, down, lora_b.t())", "pass"),
        ("d_bias = grad_y.sum(0)", "d_bias = grad_y.sum(0) * 2"),
        ("torch.mm(grad_y.t(), x)", "torch.mm(grad_y.t(), x).neg()"),
        ("torch.mm(grad_y.t(), down)", "torch.mm(grad_y.t(), down).neg()"),
        ("scaled_mm(grad_y, lora_b, ctx.scaling)", "scaled_mm(grad_y, lora_b, 1.0)"),
        ("torch.mm(up.t(), x)", "torch.mm(up.t(), x).neg()"),
        ("add_product_(d_x, up, lora_a)", "pass"),
    ),
    (PLAIN_MATH, "tests/atp_kernels/test_plain.py -k last_bit"): (
        ("if need_x or need_a else None", "if need_a else None"),
        ("if need_x or need_a else None", "if need_x else None"),
    ),
    (PLAIN_MATH, "tests/atp_kernels/test_plain.py -k 'only_what_is_needed or last_bit'"): (
        ("rows if need_w or need_a else None", "rows"),
        ("rows if need_w or need_a else None", "rows if need_a else None"),
        ("rows if need_w or need_a else None", "rows if need_w else None"),
        ("down if need_b else None", "down"),
    ),
    (CALL, QUICK): (
        ("x.ndim == 0 or weight.ndim != 2 or lora_a.ndim != 2", "weight.ndim != 2 or lora_a.ndim != 2"),
        ("x.ndim == 0 or weight.ndim != 2 or lora_a.ndim != 2", "x.ndim == 0 or lora_a.ndim != 2"),
        ("x.ndim == 0 or weight.ndim != 2 or lora_a.ndim != 2", "x.ndim == 0 or weight.ndim != 2"),
        ("x.shape[-1] == n_in == adapter_in", "x.shape[-1] == n_in"),
        ("x.shape[-1] == n_in == adapter_in", "adapter_in == n_in"),
        ("and lora_b.shape == (n_out, rank)", ""),
        ("and weight.dtype == lora_a.dtype == lora_b.dtype == dtype", ""),
        ("and weight.device == lora_a.device == lora_b.device == device", ""),
        ("tensor.shape == shape and tensor.device", "tensor.device"),
        ("and tensor.device == device and", "and"),
        ("and tensor.dtype in dtypes", ""),
        ("masks = (torch.bool, torch.float64 if dtype == torch.float64 else torch.float32)", "masks = (torch.bool,)"),
    ),
    ("atp_kernels/call.py", "tests/atp_kernels/test_zero_sizes.py -k masked_linear"): (
        ("tensor.flatten(0, -2) if", "tensor.reshape(-1, tensor.shape[-1]) if"),
    ),
}  # fmt: skip
