"""torch.library registration (schema, fake, autograd) of every operation, and its eager short cut.

A compiled or exported program sees the registered operators `torch.ops.atp_kernels.*`. Eager code takes an
`autograd.Function` over the same backend functions instead: the trainer makes hundreds of calls a step, and the
dispatcher's Python layer would cost each of them more than the function does.
"""

from atp_kernels.backends.primitives import ACTIVATIONS
from atp_kernels.ops.common import common_dtype
from atp_kernels.ops.cross_entropy import cross_entropy_op
from atp_kernels.ops.dropout import dropped, lora_dropout_op
from atp_kernels.ops.groups import (
    compact_op,
    group_lasso_backward_op,
    group_lasso_grad_op,
    group_lasso_op,
    group_prox_op,
    lasso,
    lasso_grad_,
    prox_,
)
from atp_kernels.ops.kept import flat, kept_linear, kept_lora_linear_backward_op, kept_lora_linear_op
from atp_kernels.ops.linear import linear, masked_lora_linear_backward_op, masked_lora_linear_op
from atp_kernels.ops.rms_norm import rms_norm
from atp_kernels.ops.swiglu import MlpSpec, Swiglu

__all__ = [
    "ACTIVATIONS",
    "MlpSpec",
    "Swiglu",
    "common_dtype",
    "compact_op",
    "cross_entropy_op",
    "dropped",
    "flat",
    "group_lasso_backward_op",
    "group_lasso_grad_op",
    "group_lasso_op",
    "group_prox_op",
    "kept_linear",
    "kept_lora_linear_backward_op",
    "kept_lora_linear_op",
    "lasso",
    "lasso_grad_",
    "linear",
    "lora_dropout_op",
    "masked_lora_linear_backward_op",
    "masked_lora_linear_op",
    "prox_",
    "rms_norm",
]
