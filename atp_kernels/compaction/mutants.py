"""Broken lines of compaction."""

DEFINITION = "atp_kernels/compaction/definition.py"
COMPACT = "tests/atp_kernels/test_groups.py -k compact"

TABLE = {
    (DEFINITION, COMPACT): (
        ("weight[rows]", "weight"),
        ("kept[:, cols]", "kept"),
        ("round_up(kept.shape[0], pad_to)", "kept.shape[0]"),
        ("round_up(kept.shape[1], pad_to)", "kept.shape[1]"),
        ("padded = weight.new_zeros(n_rows, n_cols)", "padded = weight.new_ones(n_rows, n_cols)"),
    ),
}
