"""Masked LoRA linears, group lasso and compaction for training that prunes: numerics only, on torch alone."""

from atp_kernels.backends.dispatch import available_backends
from atp_kernels.functional import (
    compact,
    explain,
    group_lasso,
    group_prox_,
    masked_lora_linear,
    masked_lora_linear_with_norms,
)

__all__ = [
    "available_backends",
    "compact",
    "explain",
    "group_lasso",
    "group_prox_",
    "masked_lora_linear",
    "masked_lora_linear_with_norms",
]
