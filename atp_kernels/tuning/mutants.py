"""Broken lines of the folded product and of the choice between ways."""

FOLDED = "atp_kernels/linear/folded.py"
SHARED = "atp_kernels/linear/shared.py"
SWIGLU = "atp_kernels/swiglu/op.py"
TABLES = "atp_kernels/tuning/table.py"
TILED = "atp_kernels/tuning/tiled.py"
WAYS = "atp_kernels/linear/ways.py"

FOLDED_DEFINITION = "tests/atp_kernels/test_folded.py -k equals_the_definition"
FOLDED_NO_WORSE = "tests/atp_kernels/test_folded.py -k no_worse_than_unfused"
MERGED_SLICES = "tests/atp_kernels/test_merged_weight.py -k 'sliced or others or explain'"
PLAIN_SLICES = "tests/atp_kernels/test_plain_slices.py -k 'not no_worse'"
TUNED_BLOCKS = "tests/atp_kernels/test_tuned_blocks.py"
TUNED_TABLES = "tests/atp_kernels/test_tuned_tables.py -k 'step_goes or other_kinds or environment'"

TABLE = {
    (FOLDED, FOLDED_DEFINITION): (
        ("(weight * out_mask.unsqueeze(1)).to(weight.dtype)", "weight"),
        ("(folded * in_mask).to(weight.dtype)", "folded"),
        ("torch.addmm(folded, b, a, alpha=scaling)", "torch.addmm(folded, b, a)"),
        ("(bias * out_mask).to(bias.dtype)", "bias"),
        ("scaled_mm(rows, a.t(), scaling) if need_b", "scaled_mm(rows, a.t(), 1.0) if need_b"),
        ("scaled_mm(rows, a.t(), scaling) if need_b", "scaled_mm(rows, lora_a.t(), scaling) if need_b"),
        ("scaled_mm(grad_y, b, ctx.scaling)", "scaled_mm(grad_y, b, 1.0)"),
        ("_masked_factors(lora_a, lora_b, out_mask, None)[1] if ctx.mask_lora else lora_b", "lora_b"),
        ("d_a, d_b = _masked_factors(d_a, d_b, out_mask, in_mask)", "pass"),
        ("dot(grad_y, y) / out_mask", "dot(grad_y, y)"),
        ("dot(x, d_x) / in_mask", "dot(x, d_x)"),
        ("torch.where(mask.abs() < least, torch.full_like(mask, least), mask)", "mask"),
    ),
    (FOLDED, FOLDED_NO_WORSE): (
        ("_masked_factors(lora_a, lora_b, out_mask, in_mask) if mask_lora else (lora_a, lora_b)", "lora_a, lora_b"),
        ("if ctx.mask_lora and (need_a or need_b):", "if need_a or need_b:"),
    ),
    (WAYS, PLAIN_SLICES): (
        ("all(mask is None or mask.dtype == torch.bool for mask in masks)", "True"),
        ("weight.requires_grad or (bias is not None and bias.requires_grad)", "weight.requires_grad"),
        ("weight.requires_grad or (bias is not None and bias.requires_grad)", "False"),
        ("key.m < FEWEST_ROWS", "False"),
        ("key.kept > LARGEST_SHARE", "False"),
        ("saved < LEAST_SAVED", "False"),
        ("return kept[0] * kept[1]", "return kept[0]"),
    ),
    (WAYS, MERGED_SLICES): (
        ("lora_a.shape[0] == 0 and _are_hard(out_mask, in_mask)", "_are_hard(out_mask, in_mask)"),
        ("lora_a.shape[0] == 0 and _are_hard(out_mask, in_mask)", "False"),
    ),
    (WAYS, TUNED_TABLES): (
        ("frozen = not (learns and (lora_a.requires_grad or lora_b.requires_grad))", "frozen = True"),
        ("entry.way == FOLDED and folded.refuses(operands, mask_lora)", "False"),
        ("if override() or", "if"),
        ("key = replace(key, kept=share_of(operands))", "pass"),
    ),
    (WAYS, TUNED_BLOCKS): (("return None if way is None else way.module", "return None"),),
    (SHARED, TUNED_BLOCKS): (
        ('(way is not None and way.name != "reference")', "way is not None"),
        ('(way is not None and way.name != "reference")', "False"),
        (' == "auto" and not dropout else None', ' == "auto" else None'),
        ("module not in (None, choice.module)", "module is not None"),
        ("module not in (None, choice.module)", "False"),
    ),
    (SWIGLU, TUNED_BLOCKS): (
        ("choice.module if module is None else module for module in tuned", "choice.module for module in tuned"),
        (" and backends[0] is backends[1] is choice.module", ""),
        ('if backend == "auto" and not dropout else None', ""),
        ('if backend == "auto" and not dropout else None', 'if backend == "auto" else None'),
    ),
    (TABLES, TUNED_BLOCKS): (
        ("return kept <= _ROWS * entry.key.kept and entry.key.kept <= _ROWS * kept", "return True"),
        ("return kept <= _ROWS * entry.key.kept and entry.key.kept <= _ROWS * kept", "return kept <= entry.key.kept"),
    ),
    (TILED, TUNED_BLOCKS): (("partial(module.forward, config=config)", "module.forward"),),
}
