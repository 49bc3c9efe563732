"""Broken lines of group lasso, its gradient and the proximal step."""

INIT, DEFINITION, OP, PLAN, ATEN, NATIVE, TRITON, KERNELS = (
    f"atp_kernels/groups/{name}.py"
    for name in ("__init__", "definition", "op", "plan", "aten", "native", "triton", "triton_kernels")
)
CHECKS = "atp_kernels/checks.py"

GROUPS = "tests/atp_kernels/test_groups.py"
SEPARATE = "tests/atp_kernels/test_groups_separate.py"
DIRECT = (
    "tests/atp_kernels/test_groups_direct.py tests/atp_kernels/test_groups_backends.py -k 'not triton and not outside'"
)
BAD_VALUE = "tests/atp_kernels/test_backends_agree.py -k bad_value"
TWICE = "tests/atp_kernels/test_backends_agree.py -k given_twice"
REFUSED = "tests/atp_kernels/test_backends_agree.py -k refuses_with_the_same_sentence"
PLANS = "tests/atp_kernels/test_backends_agree.py -k plan"
MULTI = "tests/atp_kernels/test_groups_backends.py -k 'triton and (no_worse or any_shape or zeros)'"
CAPTURE = "tests/atp_kernels/test_graph_capture.py"
IN_PLACE = "tests/atp_kernels/test_ops_strided.py -k in_place"
MULTI_FENCED = "tests/atp_kernels/test_groups_backends.py -k nothing_is_read"

TABLE = {
    (DEFINITION, GROUPS): (
        ("factor.to(dtype).square().sum(1 - axis)", "factor.to(dtype).abs().sum(1 - axis)"),
        ("counted = removed & owned_groups(groups, removed)", "counted = removed"),
        ("counted = removed & owned_groups(groups, removed)", "counted = owned_groups(groups, removed)"),
        ("(squares + eps).sqrt()", "squares.sqrt()"),
        ("removed.numel()).sqrt()", "removed.numel())"),
        ("torch.where(norms <= threshold, 0, 1 - threshold / norms)", "1 - threshold / norms"),
        ("0, 1 - threshold / norms", "0, 1 - threshold"),
        ("scale = torch.where(removed, shrunk, 1)", "scale = shrunk"),
        ("factor.copy_(torch.where(by_group == 0, 0, factor * by_group))", "factor.mul_(1)"),
    ),
    (ATEN, GROUPS): (
        (".add_(eps)", ""),
        ("torch.where(removed & plan.owned, norms, 0)", "torch.where(removed, norms, 0)"),
        ("torch.where(removed & plan.owned, norms, 0)", "torch.where(plan.owned, norms, 0)"),
        ("removed & (norms != 0)", "norms != 0"),
        ("removed & (norms != 0)", "removed"),
        ("grad_out / norms, 0", "1 / norms, 0"),
        ("grad_out / norms, 0", "grad_out, 0"),
        ("slope[index].unsqueeze(1 - axis)", "1"),
    ),
    (ATEN, BAD_VALUE): (
        ("torch.where(removed & plan.owned, norms, 0)", "norms.mul(removed & plan.owned)"),
        ("removed & (norms != 0)", "removed & (norms > 0)"),
        ("torch.where(by == 0, 0, factor * by)", "(factor * by)"),
    ),
    (KERNELS, BAD_VALUE): (("tl.where(norm == 0, 0.0, ratio)", "tl.where(norm > 0, ratio, 0.0)"),),
    (ATEN, TWICE): (('    check_written(grads, "gradients")\n', ""),),
    (TRITON, TWICE): (('    check_written(grads, "gradients")\n', ""),),
    (CHECKS, TWICE): (("len(set(addresses)) < len(addresses)", "False"),),
    (CHECKS, REFUSED): (
        ("0 <= eps < math.inf", "eps < math.inf"),
        ("0 <= eps < math.inf", "0 <= eps"),
        ("low < 0 or high >= size", "high >= size"),
        ("low < 0 or high >= size", "low < 0"),
        ("not tensor.is_contiguous() and _overlaps(tensor)", "False"),
    ),
    (INIT, REFUSED): (
        ("if not threshold.is_floating_point() or threshold.device != removed.device:",
         "if not threshold.is_floating_point():"),
        ("if not threshold.is_floating_point() or threshold.device != removed.device:",
         "if threshold.device != removed.device:"),
        ("elif not threshold >= 0:", "elif threshold < 0:"),
    ),
    (INIT, PLANS): (("if not plan._checked:", "if False:"),),
    (PLAN, PLANS): (
        ("return self._index.clone()", "return self._index"),
        ("return self._order.clone()", "return self._order"),
        ("return self._starts.clone()", "return self._starts"),
        ("[(axis, index.clone()) for axis, index in self._groups]", "self._groups"),
        ("(values < 0) | (values >= end)", "values >= end"),
        ("return in_order and int", "return int"),
        ("and int(self._starts[0]) == 0 and", "and"),
        ("torch.equal(self._starts.diff(), counts.int())", "True"),
    ),
    (PLAN, GROUPS): (
        ("self._starts.diff() > 0", "self._starts.diff() >= 0"),
        ("index_add_(0, index + 1, ones)", "index_add_(0, index, ones)"),
        ("torch.argsort(index, stable=True)", "torch.argsort(index, descending=True)"),
        ("if shapes != self.shapes:", "if False:"),
        ("if low < 0 or high >= n_groups:", "if high >= n_groups:"),
        ("if low < 0 or high >= n_groups:", "if low < 0:"),
    ),
    (PLAN, SEPARATE): (
        ("runs = _are_runs(index, [len(index) for _, index in groups], n_groups)", "runs = True"),
        ("runs = _are_runs(index, [len(index) for _, index in groups], n_groups)", "pass"),
        ("self.runs and self.n_groups == self._index.numel()", "self.runs"),
        ("self.runs and self.n_groups == self._index.numel()", "self.n_groups == self._index.numel()"),
        ("borders[borders < len(index)]] == 1", "borders[:0]] == 1"),
        ("return int(index[-1]) == n_groups - 1 and", "return"),
        ("((steps == 0) | (steps == 1)).all()", "(steps <= 1).all()"),
        ("((steps == 0) | (steps == 1)).all()", "(steps >= 0).all()"),
        ("and new.all()", ""),
    ),
    (OP, SEPARATE): (
        ("if plan.separate and len(dtypes) == 1", "if len(dtypes) == 1"),
        ("if plan.separate and len(dtypes) == 1", "if plan.separate"),
        ("wanted = grad_enabled and any(ctx.needs_input_grad)", "wanted = any(ctx.needs_input_grad)"),
        ("wanted = grad_enabled and any(ctx.needs_input_grad)", "wanted = grad_enabled"),
        ("in_place = not graph_is_kept()", "in_place = graph_is_kept()"),
        ("if torch.__version__ >= TORCH_TOO_NEW:", "if False:"),
    ),
    (OP, DIRECT): (
        ("_full)((), float(weight),", "_full)((), 1.0,"),
        ("if all([factor.requires_grad for factor in factors]):", "if True:"),
        ("if all([grad is not None for grad in grads]):", "if True:"),
        ("    if not factor.requires_grad:\n        return torch.zeros_like(factor)\n", ""),
        ("if not (factor.is_leaf or factor.retains_grad):", "if False:"),
        ("    if factor.grad is None:\n        factor", "    if True:\n        factor"),
        ("factor.grad = torch.zeros_like(factor)", "factor.grad = torch.ones_like(factor)"),
    ),
    (ATEN, DIRECT): (
        ("removed, norms, weight), strict=True)", "removed, norms, weight.abs()), strict=True)"),
        ("grad += part", "grad.copy_(part)"),
        ("    plan.check(factors)\n    check_written", "    check_written"),
    ),
    (NATIVE, DIRECT): (
        ("vectors = (removed.contiguous(), weight.float())", "vectors = (removed.contiguous(), weight.float().abs())"),
        ("plan.check(factors)  # says it in its own words", "pass"),
        ("torch.autograd.graph.increment_version(grads)", "pass"),
    ),
    (INIT, DIRECT): (
        ("weight.ndim != 0 or not weight", "not weight"),
        ("weight.ndim != 0 or not weight.is_floating_point() or", "weight.ndim != 0 or"),
        (" or weight.device != removed.device\n", "\n"),
        ("op.lasso_grad_(factors, plan, removed, weight, float(eps), backend)",
         "op.lasso_grad_(factors, plan, removed, weight, 1e-8, backend)"),
        ("    with torch.no_grad():\n        return op.lasso_grad_", "    if True:\n        return op.lasso_grad_"),
    ),
    (KERNELS, MULTI): (
        ("squares += tl.sum(values * values,", "squares += tl.sum(values,"),
        ("first = tl.program_id(0).to(tl.int64) * BLOCK_S\n    if first < slots:\n        slot = first + "
         "tl.arange(0, BLOCK_S)\n        for", "first = 0\n    if first < slots:\n        slot = first + "
         "tl.arange(0, BLOCK_S)\n        for"),
        ("squares_ptr + tl.load(line_ptr + 4) + slot", "squares_ptr + slot"),
        ("owned = at[None, :] < count[:, None]", "owned = at[None, :] <= count[:, None]"),
        ("for start in range(0, tl.max(count, axis=0), BLOCK_S):", "for start in range(0, 1, BLOCK_S):"),
        ("tl.sum(sums, axis=1) + eps", "tl.sum(sums, axis=1)"),
        ("tl.sqrt(", "("),
        ("removed & (count > 0)", "removed"),
        ("removed & (count > 0)", "count > 0"),
        ("removed = tl.load(removed_ptr + group) != 0", "removed = group >= 0"),
        ("index_ptr + tl.load(line_ptr + 4) + slot", "index_ptr + slot"),
        ("tl.where(removed, tl.where(norm <= by, 0.0, 1.0 - ratio), 1.0)", "tl.where(norm <= by, 0.0, 1.0 - ratio)"),
        ("tl.where(norm <= by, 0.0, 1.0 - ratio)", "1.0 - ratio"),
        ("0.0, 1.0 - ratio", "0.0, ratio"),
        ("ratio = tl.div_rn(by, tl.where(norm == 0, 1.0, norm))", "ratio = by"),
        ("tl.where(norm == 0, 0.0, ratio)", "tl.where(norm == 0, 0.0, ratio / by)"),
        ("scaled = tl.where(factor == 0, 0.0, values * factor)", "scaled = values"),
        ("scaled += tl.load(out_ptrs, mask=some, other=0.0).to(tl.float32)", "pass"),
    ),
    (KERNELS, MULTI_FENCED): (
        ("ok = (slot < slots)[:, None] & (entry < length)[None, :]", "ok = (slot < slots)[:, None]"),
        ("ok = (entry < length)[:, None] & (slot < slots)[None, :]", "ok = (slot < slots)[None, :]"),
    ),
    (TRITON, MULTI): (
        ("_group_norms(_walk(held, held, plan), plan, removed, eps)",
         "_group_norms(_walk(held, held, plan), plan, removed, 0.0)"),
        ("grad_out.float())", "grad_out.float().abs())"),
        ("weight.float(), add=True)", "weight.float() / 2, add=True)"),
        ("weight.float(), add=True)", "weight.float())"),
        ("kind = 2 * _DTYPES.index(factor.dtype) + axis", "kind = 2 * _DTYPES.index(factor.dtype)"),
        ("first_slot += slots", "first_slot += length"),
    ),
    (TRITON, CAPTURE): (
        ("if key[-1] == lines:", "if True:"),
        ('return tables.setdefault(("captured", lines), table)', "return table"),
        ("[: 1 - _TABLES]", "[:0]"),
        ("result.data_ptr() - base if", "result.data_ptr() if"),
    ),
    (CHECKS, CAPTURE): (
        ('if device.type != "cuda" or torch.compiler.is_compiling():', "if torch.compiler.is_compiling():"),
        ("    if is_capturing(device):\n        raise", "    if False:\n        raise"),
    ),
    (OP, CAPTURE): (("or checks.is_capturing(removed.device)", ""),),
    (CHECKS, IN_PLACE): (
        ("across // common < rows and down // common < cols", "down == 0 or across == 0"),
        ("across // common < rows and down // common < cols", "across // common < rows or down // common < cols"),
    ),
    (NATIVE, IN_PLACE): (("if not in_one_piece:\n", "if False:\n"),),
}  # fmt: skip
