"""Broken lines of the projections of attention."""

PROJECTION = "atp_kernels/projection.py"

BLOCKS_QKV_NO_WORSE = "tests/atp_kernels/test_blocks.py -k qkv_is_no_worse_than_unfused"

TABLE = {
    (PROJECTION, BLOCKS_QKV_NO_WORSE): (
        ("        scaling=scaling,\n        out_mask", "        scaling=1.0,\n        out_mask"),
        ("bias=bias", "bias=None"),
        ("out_mask=out_mask,", "out_mask=None,"),
        ("mask_lora=mask_lora", "mask_lora=False"),
    ),
}
