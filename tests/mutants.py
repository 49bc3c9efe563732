"""The table of `mutations.py`: lines that apply a mask, a scaling, a bias or a norm, and each of them broken.

Every old text occurs exactly once in its file. A changed kernel line needs its entry changed too: `test_mutations.py`
says which. The C++ and CUDA sources have no entries, since each mutant of them would take a rebuild.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Mutant:
    """One broken line: `old` becomes `new` in `file`, and the pytest selection `tests` must then fail."""

    file: str
    old: str
    new: str
    tests: str

    def __str__(self) -> str:
        old, new = (" ".join(text.split()) for text in (self.old, self.new))
        return f"{self.file}: {old} -> {new}"


_LINEAR = "tests/atp_kernels/test_linear.py -k no_worse_than_unfused"
_PLAIN = "tests/atp_kernels/test_plain.py -k no_worse_than_unfused"
_QUICK = "tests/atp_kernels/test_plain.py -k quick_checks"
_NORMS = "tests/atp_kernels/test_linear.py -k gradcheck"
_GROUPS = "tests/atp_kernels/test_groups.py"
_SEPARATE = "tests/atp_kernels/test_groups_separate.py"
_DIRECT = "tests/atp_kernels/test_groups_direct.py"
_KEPT = "tests/atp_kernels/test_kept.py -k no_worse_than_unfused"
_KEPT_FIRST = "tests/atp_kernels/test_kept_first.py -k no_worse_than_unfused"
_CHUNKS = "tests/atp_kernels/test_kept_chunks.py -k 'not memory_is'"
_CHUNKS_MEMORY = "tests/atp_kernels/test_kept_chunks.py -k memory_is"
_MLP = "tests/atp_kernels/test_blocks.py -k swiglu_is_no_worse_than_unfused"
_MLP_KEPT = "tests/atp_kernels/test_blocks.py -k swiglu_on_kept_slices_is_no_worse"
_ACTIVATIONS = "tests/atp_kernels/test_native_activations.py -k 'any_shape or columns'"
_QKV = "tests/atp_kernels/test_blocks.py -k qkv_is_no_worse_than_unfused"
_TILED = "tests/atp_kernels/test_linear_triton.py -k 'every_combination and soft-soft'"
_FENCED = "tests/atp_kernels/test_linear_triton.py -k nothing_is_read_outside"
_DRAWN = "tests/atp_kernels/test_linear_dropout.py -k 'published or definition or blocks or given'"
_DROPPED = "tests/atp_kernels/test_linear_triton.py -k 'combination_with_dropout and soft-soft'"
_BESIDE = "tests/atp_kernels/test_linear_triton.py -k without_masks"
_SPLIT = "tests/atp_kernels/test_linear_triton.py -k tiles_of_the_table"

_MULTI = "tests/atp_kernels/test_groups_triton.py -k 'joint or kept_groups or any_shape'"
_MULTI_FENCED = "tests/atp_kernels/test_groups_triton.py -k nothing_is_read"

_DEFINITION = "atp_kernels/reference.py"
_REFERENCE = "atp_kernels/backends/reference.py"
_PRIMITIVES = "atp_kernels/backends/primitives.py"
_NATIVE = "atp_kernels/backends/native.py"
_SLICE = "atp_kernels/slices.py"
_KEPT_MATH = "atp_kernels/backends/kept.py"
_SWIGLU = "atp_kernels/ops/swiglu.py"
_BLOCKS = "atp_kernels/blocks.py"
_PLAN = "atp_kernels/plan.py"
_OPS = "atp_kernels/ops/linear.py"
_GROUP_OPS = "atp_kernels/ops/groups.py"
_PLAIN_MATH = "atp_kernels/ops/plain.py"
_CALL = "atp_kernels/functional.py"
_KERNELS = "atp_kernels/backends/triton/kernels.py"
_GROUP_KERNELS = "atp_kernels/backends/triton/group_kernels.py"
_GROUP_LAUNCHER = "atp_kernels/backends/triton/groups.py"
_LAUNCHER = "atp_kernels/backends/triton/masked_lora_linear.py"

_TABLE = {
    (_DEFINITION, _LINEAR): (
        ("adapter_input = _masked(adapter_input, in_mask)", "pass"),
        ("base = _masked(x, in_mask) @ weight.T", "base = x @ weight.T"),
        ("base = base + bias", "pass"),
        ("adapter = scaling * (", "adapter = ("),
        ("_masked(base + adapter, out_mask) if mask_lora", "base + adapter if mask_lora"),
        ("else _masked(base, out_mask) + adapter", "else base + adapter"),
        ("else (values * mask).to(values.dtype)", "else values"),
        ("lora_input = dropped(x.reshape(-1, x.shape[-1]), dropout).view(x.shape)", "pass"),
    ),
    (_DEFINITION, _DRAWN): (
        ("PHILOX_ROUNDS = 7", "PHILOX_ROUNDS = 6"),
        ("return int(self.p * 2**32)", "return int(self.p * 2**31)"),
        ("return 1 / (1 - self.p)", "return 1.0"),
        ("self.seed >> 32 & _UINT32", "0"),
        ("torch.arange(first_row, first_row + rows,", "torch.arange(0, rows,"),
        ("^ c1 ^ k0", "^ c1"),
        ("^ c3 ^ k1", "^ c3"),
        ("torch.where(keep, values * dropout.scale, 0)", "values * dropout.scale"),
    ),
    (_DEFINITION, _MLP): (
        ("in_mask = None if mask_lora else mask", "in_mask = None"),
        ("masks=(mask, mask), mask_lora=mask_lora", "masks=(mask, None), mask_lora=mask_lora"),
        ("masks=(mask, mask), mask_lora=mask_lora", "masks=(mask, mask)"),
        ("act(g) * u, weight", "act(g), weight"),
        ("scaling=scaling, in_mask=in_mask, bias=bias)", "scaling=scaling, in_mask=in_mask)"),
        ("scaling=scaling, in_mask=in_mask, bias=bias)", "scaling=1.0, in_mask=in_mask, bias=bias)"),
    ),
    (_DEFINITION, _NORMS): (
        ("_wide(lora_b).square().sum(1)", "_wide(lora_b).abs().sum(1)"),
        ("_wide(lora_a).square().sum(0)", "_wide(lora_a).abs().sum(0)"),
    ),
    (_DEFINITION, _GROUPS): (
        ("factor.to(dtype).square().sum(1 - axis)", "factor.to(dtype).abs().sum(1 - axis)"),
        ("counted = removed & owned_groups(groups, removed)", "counted = removed"),
        ("counted = removed & owned_groups(groups, removed)", "counted = owned_groups(groups, removed)"),
        ("(squares + eps).sqrt()", "squares.sqrt()"),
        ("removed.numel()).sqrt()", "removed.numel())"),
        ("torch.where(norms <= threshold, 0, 1 - threshold / norms)", "1 - threshold / norms"),
        ("0, 1 - threshold / norms", "0, 1 - threshold"),
        ("scale = torch.where(removed, shrunk, 1)", "scale = shrunk"),
        ("factor.copy_(torch.where(by_group == 0, 0, factor * by_group))", "factor.mul_(1)"),
        ("weight[rows]", "weight"),
        ("kept[:, cols]", "kept"),
        ("round_up(kept.shape[0], pad_to)", "kept.shape[0]"),
        ("round_up(kept.shape[1], pad_to)", "kept.shape[1]"),
        ("padded = weight.new_zeros(n_rows, n_cols)", "padded = weight.new_ones(n_rows, n_cols)"),
    ),
    (_REFERENCE, _LINEAR): (
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
        ("if mask_lora:\n        total.addmm_(", "if True:\n        total.addmm_("),
        ("if mask_lora:\n        total.addmm_(", "if False:\n        total.addmm_("),
        ("primitives.masked(total, out_mask) if keep_sum", "total if keep_sum"),
        ("if keep_sum else primitives.mask_(total, out_mask)", "if keep_sum else total"),
        ("if not mask_lora:\n        y.addmm_(", "if True:\n        y.addmm_("),
        ("if not mask_lora:\n        y.addmm_(", "if False:\n        y.addmm_("),
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
    (_PRIMITIVES, _LINEAR): (
        ("if scaling == 1:", "if True:"),
        ("beta=0, alpha=scaling", "beta=0"),
        ("torch.mul(source, mask, out=target)", "target.copy_(source)"),
        ("block.mul_(mask)", "pass"),
        ("(some.to(total.dtype) * others)", "some.to(total.dtype)"),
        ("return masked(grad, mask), column_dot", "return grad, column_dot"),
    ),
    (_PRIMITIVES, _MLP): (
        ("[0](gate).mul_(up)", "[0](gate)"),
        ("forward(gate, out=d_up).mul_(d_h)", "forward(gate, out=d_up)"),
        ("backward(d_h.mul_(up), gate", "backward(d_h, gate"),
    ),
    (_NATIVE, _ACTIVATIONS): (
        ('if activation != "silu" or not _unit_stride(gate, up):', "if not _unit_stride(gate, up):"),
        ('if activation != "silu" or not _unit_stride(gate, up):', 'if activation != "silu":'),
        ("return _ops.swiglu_forward(gate, up)", "return _ops.swiglu_forward(up, gate)"),
        ('if activation != "silu" or not _unit_stride(d_h,', "if not _unit_stride(d_h,"),
        ("not _unit_stride(d_h, gate, up, d_gate, d_up):", "False:"),
        ("_ops.swiglu_backward(d_h, gate, up, d_gate, d_up)", "_ops.swiglu_backward(d_h, up, gate, d_gate, d_up)"),
    ),
    (_PRIMITIVES, _DRAWN): (
        ("reference.dropped(values[rows], dropout, first)", "reference.dropped(values[rows], dropout)"),
    ),
    (_REFERENCE, _GROUPS): (
        (".add_(eps)", ""),
        ("norms.mul(removed & plan.owned)", "norms.mul(removed)"),
        ("norms.mul(removed & plan.owned)", "norms.mul(plan.owned)"),
        ("removed & (norms > 0)", "norms > 0"),
        ("removed & (norms > 0)", "removed"),
        ("grad_out / norms, 0", "1 / norms, 0"),
        ("grad_out / norms, 0", "grad_out, 0"),
        ("slope[index].unsqueeze(1 - axis)", "1"),
    ),
    (_PLAN, _GROUPS): (
        ("self.starts.diff() > 0", "self.starts.diff() >= 0"),
        ("index_add_(0, index + 1, ones)", "index_add_(0, index, ones)"),
        ("torch.argsort(index, stable=True)", "torch.argsort(index, descending=True)"),
        ("if shapes != self.shapes:", "if False:"),
        ("if low < 0 or high >= n_groups:", "if high >= n_groups:"),
        ("if low < 0 or high >= n_groups:", "if low < 0:"),
    ),
    (_OPS, _LINEAR): (
        ("(2 * grad_cols * lora_a)", "(grad_cols * lora_a)"),
        ("(2 * grad_rows.unsqueeze(1) * lora_b)", "(grad_rows.unsqueeze(1) * lora_b)"),
        ("keep_sum = out_mask is not None and out_mask.requires_grad", "keep_sum = False"),
    ),
    (_REFERENCE, "tests/atp_kernels/test_linear.py -k compiled_operator"): (
        ("d_x if need_x else None", "d_x"),
        ("d_adapter if need_lora_input else None", "d_adapter"),
    ),
    (_PLAIN_MATH, _PLAIN): (
        ("scaled_mm(rows, lora_a.t(), scaling)", "scaled_mm(rows, lora_a.t(), 1.0)"),
        ("if bias is None else torch.addmm(bias,", "if True else torch.addmm(bias,"),
        ("y.addmm_(down, lora_b.t())", "pass"),
        ("d_bias = grad_y.sum(0)", "d_bias = grad_y.sum(0) * 2"),
        ("torch.mm(grad_y.t(), x)", "torch.mm(grad_y.t(), x).neg()"),
        ("torch.mm(grad_y.t(), down)", "torch.mm(grad_y.t(), down).neg()"),
        ("scaled_mm(grad_y, lora_b, ctx.scaling)", "scaled_mm(grad_y, lora_b, 1.0)"),
        ("torch.mm(up.t(), x)", "torch.mm(up.t(), x).neg()"),
        ("d_x.addmm_(up, lora_a)", "pass"),
    ),
    (_PLAIN_MATH, "tests/atp_kernels/test_plain.py -k last_bit"): (
        ("if need_x or need_a else None", "if need_a else None"),
        ("if need_x or need_a else None", "if need_x else None"),
    ),
    (_PLAIN_MATH, "tests/atp_kernels/test_plain.py -k 'only_what_is_needed or last_bit'"): (
        ("rows if need_w or need_a else None", "rows"),
        ("rows if need_w or need_a else None", "rows if need_a else None"),
        ("rows if need_w or need_a else None", "rows if need_w else None"),
        ("down if need_b else None", "down"),
    ),
    (_CALL, _QUICK): (
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
    ("atp_kernels/ops/common.py", _LINEAR): (("Dropout(p, int(seed)) if p else None", "None"),),
    (_SLICE, _KEPT): (
        ("kept.index_fill_(axis, gather.silent, 0)", "pass"),
        ("places[count:], Side(index, place, False)", "places[:0], Side(index, place, False)"),
    ),
    (_SLICE, "tests/atp_kernels/test_kept.py -k equals_masked"): (
        ("cls(count, None, (~mask).nonzero().squeeze(1), None)", "cls(count, None, kept[:0], None)"),
    ),
    (_SLICE, _KEPT_FIRST): (
        ("silent = torch.arange(mask.kept, mask.width,", "silent = torch.arange(mask.width, mask.width,"),
        ("Side(mask.index, mask.place, True)", "Side(mask.index, mask.place, False)"),
    ),
    (_KEPT_MATH, _KEPT): (
        ("torch.addmm(bias, rows, matrix, out=target)", "torch.mm(rows, matrix, out=target)"),
        ("_ordered(lora_a, ins, 1).t(), scaling)", "_ordered(lora_a, ins, 1).t(), 1.0)"),
        ("return result if low is None else result.addmm_(low, high)", "return result"),
        ("scaled_mm(grad_y, _ordered(lora_b, outs, 0), scaling)", "scaled_mm(grad_y, _ordered(lora_b, outs, 0), 1.0)"),
        ("_take(values[rows], part, gathered)", "gathered.copy_(values[rows, : len(part)])"),
        ("later = outs is None or not outs.kept_first", "later = False"),
        ("up if shared_input else None", "up"),
        ("up if shared_input else None", "None"),
    ),
    (_KEPT_MATH, _KEPT_FIRST): (
        ("head.addmm_(low, high[:, :width])", "pass"),
        ("torch.mm(low, high[:, width:], out=tail)", "tail.zero_()"),
        ("down = scaled_mm(x if lora_input is None else lora_input, _ordered(lora_a, ins, 1)",
         "down = scaled_mm(x if lora_input is None else lora_input, lora_a"),
        ("down, _ordered(lora_b, outs, 0).t(), spare)", "down, lora_b.t(), spare)"),
        ("(grad_y.t() @ down).index_select(0, outs.place)", "grad_y.t() @ down"),
        ("_spread_(d_a, d_a.shape[1], ins.place, rows)", "pass"),
        ("lora_a = _ordered(lora_a, ins, 1)", "pass"),
    ),
    (_KEPT_MATH, _CHUNKS): (
        ("_columns(values, source.index)", "values[:, : matrix.shape[0]]"),
        ("result = _columns(result, target.place)", "result = result[:, target.place.sort()[0]]"),
        ("later = outs is None or not outs.kept_first", "later = True"),
        ("memory = result[start + count :].view(-1)", "memory = result[start:].view(-1)"),
        ("elif by_columns:", "elif True:"),
        ("matrix[:step], bias, out)", "matrix[:step], None, out)"),
        ("out.addmm_(gathered, matrix[first : first + step])", "pass"),
        ("zip(values.split(step), out.split(step), strict=True)", "((values[:step], out[:step]),)"),
        ("block[:, :width].clone(), place", "block[:, :width], place"),
    ),
    (_KEPT_MATH, _CHUNKS_MEMORY): (
        ("values.view(torch.int16), out.view(torch.int16)", "values, out"),
        ("spare = need_a * lora_a.numel() + (need_b and later) * lora_b.numel()", "spare = grad_y.numel()"),
        ("room = min(max(spare, _FEW_ROWS * width), n * width)", "room = n * width"),
        ("target.place, max(_FEW_ROWS, min(spare, _BLOCK_ELEMENTS) // width))", "target.place, len(result))"),
    ),
    (_KEPT_MATH, "tests/atp_kernels/test_kept_first.py -k uninitialised"): (("tail.zero_()", "pass"),),
    (_SWIGLU, _MLP): (
        ("(None, in_mask) if last else (out_mask, None)", "(None, None) if last else (out_mask, None)"),
        ("(None, in_mask) if last else (out_mask, None)", "(None, in_mask) if last else (None, None)"),
        ("masked(total, out_mask) if y is None else y", "total if y is None else y"),
        ("[d_h, torch.empty_like(d_h)]", "[torch.empty_like(d_h), d_h]"),
        ("term if total is None else total.add_(term)", "term"),
        ("masked_later = total is not None and spec.mask_lora", "masked_later = total is not None"),
    ),
    (_SWIGLU, _MLP_KEPT): (
        ("*self.kept.sides, self.scaling), None", "*self.kept.sides, 1.0), None"),
        ("(grad, *saved, self.scaling, True, wanted)", "(grad, *saved, 1.0, True, wanted)"),
        ("(grad, *saved, self.scaling, True, wanted)", "(grad, *saved, self.scaling, False, wanted)"),
        ("slices = self.kept.weight(x.dtype), self.kept.bias(x.dtype)", "slices = self.kept.weight(x.dtype), None"),
    ),
    (_BLOCKS, _MLP): (
        ("(hidden, None, None if mask_lora else mask)", "(hidden, None, None)"),
        ("mask if mask is None or stacked is None else mask.repeat(2)", "None"),
        ("p.lora_b, p.bias, None, *masks)", "p.lora_b, None, None, *masks)"),
    ),
    (_BLOCKS, _QKV): (
        ("masks = torch.cat(masks)", "masks = None"),
        ('options = {"scaling": scaling, "bias": bias,', 'options = {"scaling": 1.0, "bias": bias,'),
        ('options = {"scaling": scaling, "bias": bias,', 'options = {"scaling": scaling, "bias": None,'),
        ("w.new_zeros(len(w)) if p.bias is None else p.bias", "w.new_zeros(len(w))"),
        ("lora_b, first.scaling, bias)", "lora_b, first.scaling)"),
        ("lora_b, first.scaling, bias)", "lora_b, 1.0, bias)"),
    ),
    (_KERNELS, _TILED): (
        ("total = _dot(part, b, total, UPCAST, PRECISION)", "pass"),
        ("tl.sum(b * b, axis=1), mask=ok", "tl.sum(b, axis=1), mask=ok"),
        ("x_masked = (x.to(tl.float32) * in_mask[None, :]).to(x.dtype)", "x_masked = x"),
        ("adapter = (adapter.to(tl.float32) * in_mask[None, :]).to(x.dtype)", "adapter = adapter"),
        ("if MASK_LORA and in_mask_ptr is not None:", "if in_mask_ptr is not None:"),
        ("adapter = tl.load(l_ptrs, mask=x_ok, other=0.0)", "adapter = x"),
        ("tl.sum(a_wide * a_wide, axis=1), mask=ks < tl.where(pid == 0, K - k, 0))\n            a_ptrs",
         "tl.sum(a_wide, axis=1), mask=ks < tl.where(pid == 0, K - k, 0))\n            a_ptrs"),
        ("tl.sum(a_wide * a_wide, axis=1), mask=ks < tl.where(pid == 0, K - k, 0))\n        x_ptrs",
         "tl.sum(a_wide, axis=1), mask=ks < tl.where(pid == 0, K - k, 0))\n        x_ptrs"),
        ("if bias_ptr is not None:", "if False:"),
        ("s = (s_acc * scaling)", "s = (s_acc * 1.0)"),
        ("if s_ptr is not None and MASK_LORA:", "if False:"),
        ("if s_ptr is not None and MASK_LORA:", "if s_ptr is not None:"),
        ("if s_ptr is not None and not MASK_LORA:", "if False:"),
        ("if s_ptr is not None and not MASK_LORA:", "if s_ptr is not None:"),
        ("tl.store(sum_ptr + rows[:, None] * N + cols[None, :], acc.to(", "tl.store(sum_ptr + rows[:, None] * N + "
         "cols[None, :], (2 * acc).to("),
        ("tl.sum(other.to(tl.float32) * acc, axis=0)", "tl.sum(other.to(tl.float32), axis=0)"),
        ("if out_mask_ptr is not None:", "if False:"),
        ("x = (x.to(tl.float32) * mask[None, :]).to(x.dtype)", "x = x"),
        ("(acc * scaling).to(s_ptr", "acc.to(s_ptr"),
        ("tl.sum(g.to(tl.float32) * z.to(tl.float32), axis=0)", "tl.sum(g.to(tl.float32), axis=0)"),
        ("total += tl.sum(g.to(tl.float32), axis=0)", "total += 0"),
        ("if mask_ptr is not None:\n        total *=", "if False:\n        total *="),
    ),
    (_PLAN, _SEPARATE): (
        ("separate = torch.equal(index, torch.arange(n_groups))", "separate = True"),
        ("separate = torch.equal(index, torch.arange(n_groups))", "pass"),
    ),
    (_GROUP_OPS, _SEPARATE): (
        ("if plan.separate and len(dtypes) == 1", "if len(dtypes) == 1"),
        ("if plan.separate and len(dtypes) == 1", "if plan.separate"),
        ("wanted = grad_enabled and any(ctx.needs_input_grad)", "wanted = any(ctx.needs_input_grad)"),
        ("wanted = grad_enabled and any(ctx.needs_input_grad)", "wanted = grad_enabled"),
        ("in_place = not torch", "in_place = torch"),
    ),
    (_GROUP_OPS, _DIRECT): (
        ("if all([factor.requires_grad for factor in factors]):", "if True:"),
        ("if all([grad is not None for grad in grads]):", "if True:"),
        ("    if not factor.requires_grad:\n        return torch.zeros_like(factor)\n", ""),
        ("if not (factor.is_leaf or factor.retains_grad):", "if False:"),
        ("    if factor.grad is None:\n        factor", "    if True:\n        factor"),
        ("factor.grad = torch.zeros_like(factor)", "factor.grad = torch.ones_like(factor)"),
    ),
    (_REFERENCE, _DIRECT): (
        ("removed, norms, weight), strict=True)", "removed, norms, weight.abs()), strict=True)"),
        ("grad += part", "grad.copy_(part)"),
        ("    plan.check(factors)\n    value, norms", "    value, norms"),
    ),
    (_NATIVE, _DIRECT): (
        ("vectors = (removed.contiguous(), weight.float())", "vectors = (removed.contiguous(), weight.float().abs())"),
        ("plan.check(factors)  # says it in its own words", "pass"),
        ("torch.autograd.graph.increment_version(grads)", "pass"),
    ),
    (_CALL, _DIRECT): (
        ("torch.full((), float(weight), device=removed.device)", "torch.ones((), device=removed.device)"),
        ("elif weight.ndim != 0 or not", "elif not"),
        ("or not weight.is_floating_point() or", "or"),
        ("or weight.device != removed.device:", ":"),
        ("ops.lasso_grad_(factors, plan, removed, weight, float(eps), backend)",
         "ops.lasso_grad_(factors, plan, removed, weight, 1e-8, backend)"),
        ("    with torch.no_grad():\n        return ops.lasso_grad_", "    if True:\n        return ops.lasso_grad_"),
    ),
    (_KERNELS, _DROPPED): (
        ("quads = first_col // 4 + tl.arange", "quads = tl.arange"),
        ("n_rounds=_ROUNDS", "n_rounds=10"),
        ("tl.join(w0 >= THRESHOLD, w2 >= THRESHOLD)", "tl.join(w0 >= THRESHOLD, w1 >= THRESHOLD)"),
        ("tl.join(even, odd)", "tl.join(odd, even)"),
        ("values.to(tl.float32) * SCALE, 0.0)", "values.to(tl.float32), 0.0)"),
        ("total = tl.zeros_like(acc)", "pass"),
        ("total = acc + _dropped(total, rows, first_col, seed, THRESHOLD, SCALE)", "total = acc + total"),
        ("x = _dropped(x, rows, k, seed, THRESHOLD, SCALE)", "pass"),
        ("g = _dropped(g, rows, pid_c * BLOCK_C, seed, THRESHOLD, SCALE)", "pass"),
    ),
    (_KERNELS, _BESIDE): (("y = _dropped(x, rows, first_col, seed, THRESHOLD, SCALE)", "y = x"),),
    (_KERNELS, _FENCED): (
        ("mask=col_ok[None, :] & (ranks < RANK)[:, None]", "mask=col_ok[None, :]"),
        ("x_ok = row_ok[:, None] & (ks < K - k)[None, :]\n            w_ok",
         "x_ok = row_ok[:, None]\n            w_ok"),
        ("w_ok = col_ok[None, :] & (ks < K - k)[:, None]", "w_ok = col_ok[None, :]"),
        ("(in_mask_ptr + k + ks, mask=ks < K - k, other=0)", "(in_mask_ptr + k + ks)"),
        ("x_ok = row_ok[:, None] if EVEN_K else row_ok[:, None] & (ks < K - k)[None, :]", "x_ok = row_ok[:, None]"),
        ("g_ok = row_ok[:, None] & col_ok[None, :]", "g_ok = col_ok[None, :]"),
    ),
    (_KERNELS, _SPLIT): (
        ("row_ok = rows < last", "row_ok = rows < M"),
        ("last = min(first + rows_per_split, M)", "last = M"),
        ("part_ptr += C * R", "part_ptr += 0"),
    ),
    (_GROUP_KERNELS, _MULTI): (
        ("squares += tl.sum(values * values,", "squares += tl.sum(values,"),
        ("first = tl.program_id(1).to(tl.int64) * BLOCK_S\n    if first < slots:\n        slot = first + "
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
        ("scale = tl.where(norm > 0, ratio, 0.0)", "scale = tl.where(norm > 0, ratio / by, 0.0)"),
        ("scaled = tl.where(factor == 0, 0.0, values * factor)", "scaled = values"),
        ("scaled += tl.load(out_ptrs, mask=some, other=0.0).to(tl.float32)", "pass"),
    ),
    (_GROUP_KERNELS, _MULTI_FENCED): (
        ("ok = (slot < slots)[:, None] & (entry < length)[None, :]", "ok = (slot < slots)[:, None]"),
        ("ok = (entry < length)[:, None] & (slot < slots)[None, :]", "ok = (slot < slots)[None, :]"),
    ),
    (_GROUP_LAUNCHER, _MULTI): (
        ("_group_norms(_walk(held, held, plan), plan, removed, eps)",
         "_group_norms(_walk(held, held, plan), plan, removed, 0.0)"),
        ("grad_out.float())", "grad_out.float().abs())"),
        ("weight.float(), add=True)", "weight.float() / 2, add=True)"),
        ("weight.float(), add=True)", "weight.float())"),
        ("kind = 2 * _DTYPES.index(factor.dtype) + axis", "kind = 2 * _DTYPES.index(factor.dtype)"),
        ("first_slot += slots", "first_slot += length"),
    ),
    (_LAUNCHER, _TILED): (
        ("_down(adapter_input, lora_a, in_mask if mask_lora else None,", "_down(adapter_input, lora_a, None,"),
        ("_down(adapter_input, lora_a, in_mask if mask_lora else None,", "_down(adapter_input, lora_a, in_mask,"),
        ("x if lora_input is None else lora_input\n            _down", "x\n            _down"),
        ("out_mask, in_mask, y, config, mask_lora", "None, in_mask, y, config, mask_lora"),
        ("out_mask, in_mask, y, config, mask_lora", "out_mask, None, y, config, mask_lora"),
        ("bias=bias, total=total", "bias=None, total=total"),
        ("lora_out_mask = out_mask if mask_lora else None", "lora_out_mask = None"),
        ("lora_out_mask = out_mask if mask_lora else None", "lora_out_mask = out_mask"),
        ("lora_in_mask = in_mask if mask_lora else None", "lora_in_mask = None"),
        ("lora_in_mask = in_mask if mask_lora else None", "lora_in_mask = in_mask"),
        ("factor_mask=lora_out_mask, sum_mask=out_mask", "factor_mask=None, sum_mask=out_mask"),
        ("factor_mask=lora_out_mask, sum_mask=out_mask", "factor_mask=lora_out_mask"),
        ("_down(grad_y, lora_b.t(), lora_out_mask, scaling, up)", "_down(grad_y, lora_b.t(), lora_out_mask, 1.0, up)"),
        ("_down(grad_y, lora_b.t(), lora_out_mask, scaling, up)", "_down(grad_y, lora_b.t(), None, scaling, up)"),
        ("factor_mask=lora_in_mask, transpose=True", "transpose=True"),
        ("mask_(d_weight, None if out_mask is None else out_mask.unsqueeze(1))", "pass"),
        ("mask_(d_weight, in_mask)", "pass"),
        ("d_in += _reduce_rows(lora_input, z=d_adapter)[1]", "pass"),
        ("mask_(d_adapter, lora_in_mask)", "pass"),
        ("up, in_mask, out_mask, d_x, config", "up, None, out_mask, d_x, config"),
        ("up, in_mask, out_mask, d_x, config", "up, in_mask, None, d_x, config"),
    ),
    (_LAUNCHER, _DROPPED): (
        ("scaling, down, a_sq, dropout)", "scaling, down, a_sq)"),
        ("transpose=True, dropout=dropout", "transpose=True"),
        ("parts=parts, dropout=dropout", "parts=parts"),
    ),
    (_LAUNCHER, "tests/atp_kernels/test_linear_triton.py -k half_precision"): (
        ("one_pass = config.one_pass and dropout is None", "one_pass = config.one_pass"),
    ),
    (_LAUNCHER, _BESIDE): (
        ("keep_sum, with_norms, dropout, primitives=_PRIMITIVES", "keep_sum, with_norms, primitives=_PRIMITIVES"),
        ("shared_input, needs, dropout, primitives=_PRIMITIVES", "shared_input, needs, primitives=_PRIMITIVES"),
    ),
}  # fmt: skip

MUTANTS = tuple(Mutant(file, old, new, tests) for (file, tests), changes in _TABLE.items() for old, new in changes)
