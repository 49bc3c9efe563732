"""Masked LoRA linears, group lasso and compaction for training that prunes: numerics only, on torch alone."""

import os

from atp_kernels import layers, nn
from atp_kernels.call import available_backends, explain
from atp_kernels.compaction import compact
from atp_kernels.dropout import lora_dropout, new_seed
from atp_kernels.groups import GroupPlan, group_lasso, group_lasso_grad_, group_prox_
from atp_kernels.kept import kept_lora_linear
from atp_kernels.kept.sides import KeptFirst
from atp_kernels.kept.slices import KeptSlice
from atp_kernels.linear import masked_lora_linear
from atp_kernels.loss import cross_entropy_
from atp_kernels.mask_gradient import mask_gradient
from atp_kernels.norm import add_rms_norm, rms_norm
from atp_kernels.projection import Projection
from atp_kernels.qkv import masked_lora_qkv
from atp_kernels.quantized import QuantizedWeight
from atp_kernels.rotary import rotary_embedding
from atp_kernels.selftest import selftest
from atp_kernels.swiglu import masked_lora_swiglu

PRODUCTS_HELD = 4096
"""Compiled products that oneDNN holds on a CPU, one per shape, unless the environment says otherwise.

It takes half a millisecond to compile one, and holds 1,024 by itself. Layers of different widths, and steps of
different numbers of tokens, have more shapes than that. oneDNN reads the variable at its first product.
"""
os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", str(PRODUCTS_HELD))

__all__ = [
    "GroupPlan",
    "KeptFirst",
    "KeptSlice",
    "Projection",
    "QuantizedWeight",
    "add_rms_norm",
    "available_backends",
    "compact",
    "cross_entropy_",
    "explain",
    "group_lasso",
    "group_lasso_grad_",
    "group_prox_",
    "kept_lora_linear",
    "layers",
    "lora_dropout",
    "mask_gradient",
    "masked_lora_linear",
    "masked_lora_qkv",
    "masked_lora_swiglu",
    "new_seed",
    "nn",
    "rms_norm",
    "rotary_embedding",
    "selftest",
]
