"""Broken lines of dropout by position and seed."""

DEFINITION = "atp_kernels/dropout/definition.py"
TRITON = "atp_kernels/dropout/triton.py"
OP = "atp_kernels/dropout/op.py"
ATEN = "atp_kernels/dropout/aten.py"
ROOM = "atp_kernels/dropout/__init__.py"

LINEAR_DROPOUT_PUBLISHED_DEFINITION = (
    "tests/atp_kernels/test_dropout.py -k 'published or definition or blocks or given'"
)
LINEAR_TRITON_COMBINATION_WITH = "tests/atp_kernels/test_linear_triton.py -k 'combination_with_dropout and soft-soft'"
LINEAR_NO_WORSE_THAN = "tests/atp_kernels/test_linear.py -k no_worse_than_unfused"
LINEAR_TRITON_WITHOUT_MASKS = "tests/atp_kernels/test_linear_triton.py -k without_masks"
DEVICE_SEED = "tests/atp_kernels/test_dropout.py -k 'seed and not compiles'"
OFFSETS = "tests/atp_kernels/test_offsets.py -k dropout_counts"

TABLE = {
    (DEFINITION, LINEAR_DROPOUT_PUBLISHED_DEFINITION): (
        ("PHILOX_ROUNDS = 7", "PHILOX_ROUNDS = 6"),
        ("return int(self.p * 2**32)", "return int(self.p * 2**31)"),
        ("return 1 / (1 - self.p)", "return 1.0"),
        ("self.seed >> 32 & _UINT32", "0"),
        ("torch.arange(first_row, first_row + rows,", "torch.arange(0, rows,"),
        ("^ c1 ^ k0", "^ c1"),
        ("^ c3 ^ k1", "^ c3"),
        ("torch.where(keep, values * dropout.scale, 0)", "values * dropout.scale"),
    ),
    (TRITON, LINEAR_TRITON_COMBINATION_WITH): (
        ("quads = first_col // 4 + tl.arange", "quads = tl.arange"),
        ("n_rounds=_ROUNDS", "n_rounds=10"),
        ("tl.join(w0 >= THRESHOLD, w2 >= THRESHOLD)", "tl.join(w0 >= THRESHOLD, w1 >= THRESHOLD)"),
        ("tl.join(even, odd)", "tl.join(odd, even)"),
        ("values.to(tl.float32) * SCALE, 0.0)", "values.to(tl.float32), 0.0)"),
    ),
    (TRITON, LINEAR_TRITON_WITHOUT_MASKS): (
        ("y = dropped_tile(x, rows, first_col, seed_of(seed, seed_ptr), THRESHOLD, SCALE)", "y = x"),
    ),
    (TRITON, OFFSETS): (("passes_int32(values, result)", "passes_int32(values)"),),
    (OP, LINEAR_NO_WORSE_THAN): (("None if not p or seed is None else Dropout(p, unread(seed))", "None"),),
    (TRITON, DEVICE_SEED): (
        ("if seed_ptr is not None:", "if False:"),
        ('"seed_ptr": seed if on_device else None', '"seed_ptr": None'),
    ),
    (OP, DEVICE_SEED): (
        ("ctx.save_for_backward(held(dropout))", "pass"),
        ("isinstance(dropout.seed, Tensor) else None", "False else None"),
    ),
    (ROOM, DEVICE_SEED): (("device = x.device if is_capturing(x.device) else", "device ="),),
    (ATEN, LINEAR_DROPOUT_PUBLISHED_DEFINITION): (
        ("definition.dropped(values[rows], dropout, first)", "definition.dropped(values[rows], dropout)"),
    ),
}
