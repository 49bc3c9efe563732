"""Kept slices: what is gathered, put back and left in place, and in how much memory."""

from mutants.mutant import Table

SLICE = "atp_kernels/slices.py"
KEPT_MATH = "atp_kernels/backends/kept.py"
PRIMITIVES = "atp_kernels/backends/primitives.py"

KEPT = "tests/atp_kernels/test_kept.py -k no_worse_than_unfused"
KEPT_FIRST = "tests/atp_kernels/test_kept_first.py -k no_worse_than_unfused"
CHUNKS = "tests/atp_kernels/test_kept_chunks.py -k 'not memory_is'"
CHUNKS_MEMORY = "tests/atp_kernels/test_kept_chunks.py -k memory_is"

TABLE: Table = {
    (SLICE, KEPT): (
        ("kept.index_fill_(axis, gather.silent, 0)", "pass"),
        ("places[count:], Side(index, place, False)", "places[:0], Side(index, place, False)"),
    ),
    (SLICE, "tests/atp_kernels/test_kept.py -k equals_masked"): (
        ("cls(count, None, (~mask).nonzero().squeeze(1), None)", "cls(count, None, kept[:0], None)"),
    ),
    (SLICE, KEPT_FIRST): (
        ("silent = torch.arange(mask.kept, mask.width,", "silent = torch.arange(mask.width, mask.width,"),
        ("Side(mask.index, mask.place, True)", "Side(mask.index, mask.place, False)"),
    ),
    (SLICE, "tests/atp_kernels/test_kept_stale.py"): (
        ("tensor._version != version", "False"),
        ('given = ("weight", weight), ("bias", bias)', 'given = (("weight", weight),)'),
        ("if (_version(self.out_mask), _version(self.in_mask)) != self._mask_versions:", "if False:"),
        ("if _version(new) != new._version:", "if False:"),
    ),
    (KEPT_MATH, KEPT): (
        ("torch.addmm(bias, rows, matrix, out=target)", "torch.mm(rows, matrix, out=target)"),
        ("_ordered(lora_a, ins, 1).t(), scaling)", "_ordered(lora_a, ins, 1).t(), 1.0)"),
        ("return result if low is None else result.addmm_(low, high)", "return result"),
        ("scaled_mm(grad_y, _ordered(lora_b, outs, 0), scaling)", "scaled_mm(grad_y, _ordered(lora_b, outs, 0), 1.0)"),
        ("primitives.take_columns(values[rows], part, gathered)", "gathered.copy_(values[rows, : len(part)])"),
        ("later = outs is None or not outs.kept_first", "later = False"),
        ("low = up if shared_input else None", "low = up"),
        ("low = up if shared_input else None", "low = None"),
    ),
    (KEPT_MATH, KEPT_FIRST): (
        ("head.addmm_(low, high[:, :width])", "pass"),
        ("torch.mm(low, high[:, width:], out=tail)", "tail.zero_()"),
        ("down = scaled_mm(x if lora_input is None else lora_input, _ordered(lora_a, ins, 1)",
         "down = scaled_mm(x if lora_input is None else lora_input, lora_a"),
        ("lora_b = _ordered(lora_b, outs, 0)\n", "pass\n"),
        ("(grad_y.t() @ down).index_select(0, outs.place)", "grad_y.t() @ down"),
        ("primitives.spread_columns_(d_a, d_a.shape[1], ins.place, rows)", "pass"),
        ("lora_a = _ordered(lora_a, ins, 1)", "pass"),
    ),
    (KEPT_MATH, CHUNKS): (
        ("_columns(values, source.index, primitives)", "values[:, : matrix.shape[0]]"),
        ("result = _columns(result, target.place, primitives)", "result = result[:, target.place.sort()[0]]"),
        ("later = outs is None or not outs.kept_first", "later = True"),
        ("memory = result[start + count :].view(-1)", "memory = result[start:].view(-1)"),
        ("elif by_columns:", "elif True:"),
        ("matrix[:step], bias, out)", "matrix[:step], None, out)"),
        ("out.addmm_(gathered, matrix[first : first + step])", "pass"),
        ("zip(values.split(step), out.split(step), strict=True)", "((values[:step], out[:step]),)"),
    ),
    (PRIMITIVES, CHUNKS): (
        ("block[:, :width].clone(), place", "block[:, :width], place"),
        ("torch.gather(values, 1, index.expand(values.shape[0], -1), out=out)", "out.copy_(values[:, : len(index)])"),
    ),
    (PRIMITIVES, CHUNKS_MEMORY): (("values.view(torch.int16), out.view(torch.int16)", "values, out"),),
    (KEPT_MATH, CHUNKS_MEMORY): (
        ("spare = need_a * lora_a.numel() + (need_b and later) * lora_b.numel()", "spare = grad_y.numel()"),
        ("room = min(max(spare, _FEW_ROWS * width), n * width)", "room = n * width"),
        ("rows = max(_FEW_ROWS, min(spare, _BLOCK_ELEMENTS) // width)", "rows = len(result)"),
    ),
    (KEPT_MATH, "tests/atp_kernels/test_kept_first.py -k uninitialised"): (("tail.zero_()", "pass"),),
}  # fmt: skip
