"""torch.library registration (schema, fake, autograd) of every operation, and its eager short cut.

A compiled or exported program sees the registered operators `torch.ops.atp_kernels.*`. Eager code takes an
`autograd.Function` over the same backend functions instead: the trainer makes hundreds of calls a step, and the
dispatcher's Python layer would cost each of them more than the function does.
"""

from atp_kernels.call import Operation, Order, register
from atp_kernels.ops.cross_entropy import cross_entropy_op
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

ALL = ("reference", "triton", "native")
NATIVE = Order(("native", "reference"))
BOTH = Order(("native", "triton", "reference"))
for _name in ("group_lasso", "group_lasso_grad_", "group_prox_"):
    register(Operation(_name, "atp_kernels.backends", ALL, {"cpu": NATIVE, "cuda": BOTH}))
register(Operation("compact", "atp_kernels.backends", ("reference", "native"), {"cpu": NATIVE, "cuda": NATIVE}))
register(Operation("cross_entropy_", "atp_kernels.backends", ("reference", "native"), {"cpu": NATIVE}))

__all__ = [
    "compact_op",
    "cross_entropy_op",
    "group_lasso_backward_op",
    "group_lasso_grad_op",
    "group_lasso_op",
    "group_prox_op",
    "lasso",
    "lasso_grad_",
    "prox_",
]
