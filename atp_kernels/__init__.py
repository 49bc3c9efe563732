"""Masked LoRA linears, group lasso and compaction for training that prunes: numerics only, on torch alone."""

from atp_kernels import nn
from atp_kernels.blocks import masked_lora_qkv, masked_lora_swiglu, stack_weights
from atp_kernels.call import available_backends, explain
from atp_kernels.functional import (
    compact,
    cross_entropy_,
    group_lasso,
    group_lasso_grad_,
    group_prox_,
    lora_dropout,
    masked_lora_linear,
    masked_lora_linear_with_norms,
)
from atp_kernels.kept import kept_lora_linear
from atp_kernels.norm import rms_norm
from atp_kernels.plan import GroupPlan
from atp_kernels.reference import Projection
from atp_kernels.slices import KeptFirst, KeptSlice, Scratch

__all__ = [
    "GroupPlan",
    "KeptFirst",
    "KeptSlice",
    "Projection",
    "Scratch",
    "available_backends",
    "compact",
    "cross_entropy_",
    "explain",
    "group_lasso",
    "group_lasso_grad_",
    "group_prox_",
    "kept_lora_linear",
    "lora_dropout",
    "masked_lora_linear",
    "masked_lora_linear_with_norms",
    "masked_lora_qkv",
    "masked_lora_swiglu",
    "nn",
    "rms_norm",
    "stack_weights",
]
