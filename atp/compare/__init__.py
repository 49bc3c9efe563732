"""`atp compare`: ATP and other systems on the same splits, training tokens, LoRA and share of parameters."""

from atp.compare.comparison import Comparison

__all__ = ["Comparison"]
