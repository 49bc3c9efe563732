"""The `triton` backend: the masked LoRA linear and the group lasso on CUDA, and on a CPU under TRITON_INTERPRET=1."""

from atp_kernels import triton_runtime
from atp_kernels.backends.kept import kept_lora_linear_backward, kept_lora_linear_forward
from atp_kernels.backends.primitives import gated, gated_backward
from atp_kernels.backends.triton.groups import (
    group_lasso_backward,
    group_lasso_forward,
    group_lasso_grad_,
    group_prox_,
)
from atp_kernels.backends.triton.masked_lora_linear import (
    dropped,
    masked_lora_linear_backward,
    masked_lora_linear_forward,
)
from atp_kernels.call import Call

ADDMM_CHAIN = False

__all__ = [
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
    "supports",
]


def supports(call: Call) -> str | None:
    return triton_runtime.refuses(call)
