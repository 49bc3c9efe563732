"""Broken lines of the projections of attention."""

PROJECTION = "atp_kernels/projection.py"
SHARED = "atp_kernels/linear/shared.py"

BLOCKS_DROPOUT = "tests/atp_kernels/test_blocks_dropout.py tests/atp_kernels/test_blocks.py -k qkv"
BLOCKS_QKV_NO_WORSE = "tests/atp_kernels/test_blocks.py -k qkv_is_no_worse_than_unfused"

TABLE = {
    (PROJECTION, BLOCKS_QKV_NO_WORSE): (
        ("        scaling=scaling,\n        out_mask", "        scaling=1.0,\n        out_mask"),
        ("bias=bias", "bias=None"),
        ("out_mask=out_mask,", "out_mask=None,"),
        ("mask_lora=mask_lora", "mask_lora=False"),
    ),
    (SHARED, "tests/atp_kernels/test_shared_linears.py -k 'definition'"): (
        ("torch.mm(up, torch.cat([linear.lora_a for linear in linears]))", "torch.zeros_like(x)"),
        ("beta=0, alpha=scaling)", "beta=0)"),
        ("return grad[:, : len(linear.weight)]", "return grad[:, -len(linear.weight) :]"),
        ("d_x.addmm_(_kept(grad, linear), linear.weight)", "d_x = _kept(grad, linear) @ linear.weight"),
        ("in_order(grad.t() @ part, linear.outs)", "grad.t() @ part"),
    ),
    (SHARED, "tests/atp_kernels/test_shared_linears.py -k 'alone'"): (
        ("len(set(map(float, scalings))) == 1 and", "True and"),
        ("all(slice_.sides[1] is None for slice_ in kept or ())", "True"),
        ("if trains(operands) or", "if"),
    ),
    (SHARED, BLOCKS_DROPOUT): (
        ("scaling, None if drop is None else drop(rows))", "scaling)"),
        ("d_x = d_x if drop is None else drop(d_x)", "pass"),
        ("(x if drop is None else drop(x))", "x"),
        ("ctx.save_for_backward(held(drop), rows", "ctx.save_for_backward(None, rows"),
        ("drop = drop_of(dropout, seed, backend)", "drop = None"),
    ),
    (PROJECTION, BLOCKS_DROPOUT): (
        ("scaling=scaling, dropout=dropout, seed=seed, backend", "scaling=scaling, backend"),
        ("        dropout=dropout,\n", "        dropout=0.0,\n"),
    ),
}
