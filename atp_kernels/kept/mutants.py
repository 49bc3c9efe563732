"""Broken lines of kept slices."""

SLICES = "atp_kernels/kept/slices.py"
SIDES = "atp_kernels/kept/sides.py"
ATEN = "atp_kernels/kept/aten.py"
OP = "atp_kernels/kept/op.py"
FORMS = "atp_kernels/kept/forms.py"

KEPT_NO_WORSE_THAN = "tests/atp_kernels/test_kept.py -k no_worse_than_unfused"
KEPT_STALE = "tests/atp_kernels/test_kept_stale.py"
KEPT_REUSE = "tests/atp_kernels/test_kept_reuse.py"
KEPT_CHUNKS_MEMORY = "tests/atp_kernels/test_kept_chunks.py -k 'not memory_is'"
KEPT_CHUNKS_MEMORY_2 = "tests/atp_kernels/test_kept_chunks.py -k memory_is"
TUNED_BLOCKS = "tests/atp_kernels/test_tuned_blocks.py"
KEPT_FORMS = "tests/atp_kernels/test_kept_forms.py -k 'not no_worse'"
BLOCKS_DROPOUT = "tests/atp_kernels/test_blocks_dropout.py -k 'kept and linear'"
KEPT_UNINITIALISED = "tests/atp_kernels/test_kept.py -k uninitialised"

TABLE = {
    (SLICES, KEPT_NO_WORSE_THAN): (("kept.index_fill_(axis, gather.silent, 0)", "pass"),),
    (SIDES, KEPT_NO_WORSE_THAN): (
        ("places[count:], Side(index, place, False)", "places[:0], Side(index, place, False)"),
        ("cls(count, None, (~mask).nonzero().squeeze(1), None)", "cls(count, None, kept[:0], None)"),
        ("silent = torch.arange(mask.kept, mask.width,", "silent = torch.arange(mask.width, mask.width,"),
        ("Side(mask.index, mask.place, True)", "Side(mask.index, mask.place, False)"),
    ),
    (SIDES, KEPT_FORMS): (
        ("removed.argsort(descending=True, stable=True)[: removed.numel() - self.count]", "self.silent"),
        ("if self.index is None or self.side is None or self.side.kept_first:", "if self.index is None:"),
    ),
    (SLICES, KEPT_FORMS): (
        ("made._held = None", "pass"),
        ("version_of(t) if unchanged else CHANGED", "version_of(t)"),
    ),
    (SIDES, KEPT_REUSE): (
        ("if reuse is not None and not reuse.given_away:", "if reuse is not None:"),
        ("reuse.given_away = True", "pass"),
        (" and not old.is_inference()", ""),
        ("return old.copy_(new) if fits else new", "return old if fits else new"),
        ("return old.copy_(new) if fits else new", "return new"),
        ("return new, new is old", "return new, True"),
        ("new.index is old.index and new.place is old.place", "True"),
    ),
    (SLICES, KEPT_REUSE): (
        ("if reuse is not None and not reuse._given_away:", "if reuse is not None:"),
        ("if old._gathers and self._gathers:", "if self._gathers:"),
        ("self._cols).to(held.dtype))", "self._cols))"),
        ("one and other and self.weight", "self.weight"),
        ("old._rows is not None and self._rows is not None:", "self._rows is not None:"),
        ("slice_._given_away, slice_._held = True, None", "pass"),
        ("for slice_ in (old, old._zeroed):", "for slice_ in (old, None):"),
        ("if self._given_away or any(order.given_away for order in orders):", "if self._given_away:"),
        ("if self._given_away or (version_of(", "if (version_of("),
    ),
    (FORMS, KEPT_FORMS): (
        (" or kept.quantized", ""),
        ("return kept.zeroed if zeroed else kept, None", "return kept.zeroed, None"),
        ("(FIRST if side is not None and side.kept_first else KEPT)[place]", "KEPT[0]"),
        ("x.numel() // k, n, k, rank, kept.share", "x.numel() // k, n, k, rank, 1.0"),
    ),
    (FORMS, TUNED_BLOCKS): (
        ("(FIRST if side is not None and side.kept_first else KEPT)[place]", "KEPT[place]"),
        ("kept.holds_zeroed or not checks.is_capturing(x.device)", "True"),
        ("kept.holds_zeroed or not checks.is_capturing(x.device)", "not checks.is_capturing(x.device)"),
        ("return kept, None if way is None else way[0]", "return kept, None"),
        ("(entry.way, why + way[1])", "(choice.name, choice.why)"),
    ),
    (SLICES, KEPT_STALE): (
        ("version_of(tensor) != version:", "False:"),
        ('given = ("weight", weight), ("bias", bias)', 'given = (("weight", weight),)'),
        ("or (version_of(self.out_mask), version_of(self.in_mask)) != self._mask_versions:", "or False:"),
        ("if version_of(new) != new._mask_version:", "if False:"),
        ("(name, tensor, version_of(tensor)) for name", "(name, tensor.detach(), version_of(tensor)) for name"),
    ),
    (SIDES, KEPT_STALE): (("if self._mask_version else CHANGED", "if True else CHANGED"),),
    (ATEN, KEPT_NO_WORSE_THAN): (
        ("own, high, bias, out=target)", "own, high, None, out=target)"),
        ("ordered(lora_a, ins, 1).t(), scaling)", "ordered(lora_a, ins, 1).t(), 1.0)"),
        ("if low is None or together else result.addmm_(low, high)", "if True else result.addmm_(low, high)"),
        ("scaled_mm(grad_y, ordered(lora_b, outs, 0), scaling)", "scaled_mm(grad_y, ordered(lora_b, outs, 0), 1.0)"),
        ("primitives.take_columns(values[rows], part, gathered)", "gathered.copy_(values[rows, : len(part)])"),
        ("if side is None or not side.kept_first:", "if side is None:"),
        ("low = up if shared_input else None", "low = up"),
        ("low = up if shared_input else None", "low = None"),
        ("bias, head, *adapter)\n    elif on_cpu:", "bias, head)\n    elif on_cpu:"),
        ("torch.mm(low, high[:, width:], out=tail)", "tail.zero_()"),
        ("lora_b = ordered(lora_b, outs, 0)\n", "pass\n"),
        ("primitives.spread_columns_(d_a, d_a.shape[1], ins.place, rows)", "pass"),
        ("lora_a = ordered(lora_a, ins, 1)", "pass"),
        (
            "s = scaled_mm(x if lora_input is None else lora_input, ordered(lora_a, ins, 1)",
            "s = scaled_mm(x if lora_input is None else lora_input, lora_a",
        ),
        ("in_order(grad_y.t() @ s, outs)", "grad_y.t() @ s"),
    ),
    (ATEN, KEPT_CHUNKS_MEMORY): (
        ("_columns(values, source.index, primitives)", "values[:, : matrix.shape[0]]"),
        ("result = _columns(result, target.place, primitives)", "result = result[:, target.place.sort()[0]]"),
        ("return d_b.index_select(0, side.place)", "return d_b"),
        ("memory = result[start + count :].view(-1)", "memory = result[start:].view(-1)"),
        ("elif by_columns:", "elif True:"),
        ("matrix[:step], bias, out)", "matrix[:step], None, out)"),
        ("out.addmm_(gathered, matrix[first : first + step])", "pass"),
        ("zip(blocks, out.split(step), lows, strict=True)", "((values[:step], out[:step], lows[0]),)"),
        ("block[:, :width].clone(), place", "block[:, :width], place"),
        ("torch.gather(values, 1, index.expand(values.shape[0], -1), out=out)", "out.copy_(values[:, : len(index)])"),
    ),
    (ATEN, KEPT_CHUNKS_MEMORY_2): (
        ("values.view(torch.int16), out.view(torch.int16)", "values, out"),
        ("spare = need_a * lora_a.numel() + need_b * lora_b.numel()", "spare = grad_y.numel()"),
        ("if not _on_cpu(d_b):", "if True:"),
        ("room = min(max(spare, _FEW_ROWS * width), n * width)", "room = n * width"),
        ("rows = max(_FEW_ROWS, min(spare, _BLOCK_ELEMENTS) // width)", "rows = len(result)"),
    ),
    (OP, BLOCKS_DROPOUT): (
        ("adapter = given if drop is None else drop(rows)", "adapter = given"),
        ("read = rows if given is None else given", "read = rows if adapter is None else adapter"),
        ("read = None if read is None else drop(read)", "pass"),
        ("d_x.add_(drop(d_adapter)), None", "d_x.add_(d_adapter), None"),
        ("s if need_b else None, held(drop))", "s if need_b else None, None)"),
        ("lora_input = dropped(x, dropout, seed, backend)", "pass"),
    ),
    (ATEN, KEPT_UNINITIALISED): (("tail.zero_()", "pass"),),
}
