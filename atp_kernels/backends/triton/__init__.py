"""The `triton` backend: the group lasso."""

from atp_kernels import triton_runtime
from atp_kernels.backends.triton.groups import (
    group_lasso_backward,
    group_lasso_forward,
    group_lasso_grad_,
    group_prox_,
)
from atp_kernels.call import Call

__all__ = [
    "group_lasso_backward",
    "group_lasso_forward",
    "group_lasso_grad_",
    "group_prox_",
    "supports",
]


def supports(call: Call) -> str | None:
    return triton_runtime.refuses(call)
