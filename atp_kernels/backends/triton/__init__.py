"""The `triton` backend: the masked LoRA linear and the group lasso on CUDA, and on a CPU under TRITON_INTERPRET=1."""

from importlib.util import find_spec

import torch

from atp_kernels.backends.kept import kept_lora_linear_backward, kept_lora_linear_forward
from atp_kernels.backends.primitives import gated, gated_backward

AVAILABLE = find_spec("triton") is not None
REASON = None if AVAILABLE else "the triton package is not installed; run pip install triton"
INTERPRETED = False
ADDMM_CHAIN = False

if AVAILABLE:
    from atp_kernels.backends.triton.groups import (
        group_lasso_backward,
        group_lasso_forward,
        group_lasso_grad_,
        group_prox_,
    )
    from atp_kernels.backends.triton.masked_lora_linear import (
        INTERPRETED,
        dropped,
        masked_lora_linear_backward,
        masked_lora_linear_forward,
    )

    if not INTERPRETED and not torch.cuda.is_available():
        AVAILABLE = False
        REASON = "there is no CUDA device; TRITON_INTERPRET=1, set before the start, emulates one on a CPU"

__all__ = [
    "AVAILABLE",
    "INTERPRETED",
    "REASON",
    "dropped",
    "gated",
    "gated_backward",
    "group_lasso_backward",
    "group_lasso_forward",
    "group_lasso_grad_",
    "group_prox_",
    "kept_lora_linear_backward",
    "kept_lora_linear_forward",
    "masked_lora_linear_backward",
    "masked_lora_linear_forward",
]
