"""Which way of computing a masked LoRA linear is the fastest on this device: timed once, and read by dispatch.

`python -m atp_kernels.tune` times the candidates and writes a table; `table` finds and reads it.
"""
