"""Frozen weights in 4 or 8 bits, which the LoRA linears of this package take in place of a floating one."""

from atp_kernels.quantized.weight import QuantizedWeight, dense, refuse_training

__all__ = ["QuantizedWeight", "dense", "refuse_training"]
