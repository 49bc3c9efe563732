"""torch.library registration (schema, fake, autograd) of every operation, and its eager short cut.

A compiled or exported program sees the registered operators `torch.ops.atp_kernels.*`. Eager code takes an
`autograd.Function` over the same backend functions instead: the trainer makes hundreds of calls a step, and the
dispatcher's Python layer would cost each of them more than the function does.
"""

from atp_kernels.backends.primitives import ACTIVATIONS
from atp_kernels.call import Operation, Order, register
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
from atp_kernels.ops.swiglu import MlpSpec, Swiglu

ALL = ("reference", "triton", "native")
TRITON, NATIVE = Order(("triton", "reference")), Order(("native", "reference"))
BOTH = Order(("native", "triton", "reference"))
# Both call the same vendor GEMM; around it, native masks and sums took 0.13 to 1.0 of the time, without a mask there is
# nothing to do for either (768 x 576 to 768 x 1536, two threads).
for _name in ("masked_lora_linear", "masked_lora_linear_with_norms", "masked_lora_swiglu", "masked_lora_qkv"):
    # A Triton GEMM reaches about 0.87 of the vendor's on H100, which costs more than an addmm_ of the adapter.
    _plain = Order(("reference",), "no mask and no dropout, so nothing to fuse beats the addmm_ chain")
    register(Operation(_name, "atp_kernels.backends", ALL, {"cpu": NATIVE, "cuda": TRITON, "cuda plain": _plain}))
# Its products are the vendor's in every backend; what a CPU does in C++ around them is ATen's elsewhere.
register(Operation("kept_lora_linear", "atp_kernels.backends", ALL, {"cpu": NATIVE}))
register(Operation("lora_dropout", "atp_kernels.backends", ALL, {"cpu": NATIVE, "cuda": TRITON}))
for _name in ("group_lasso", "group_lasso_grad_", "group_prox_"):
    register(Operation(_name, "atp_kernels.backends", ALL, {"cpu": NATIVE, "cuda": BOTH}))
register(Operation("compact", "atp_kernels.backends", ("reference", "native"), {"cpu": NATIVE, "cuda": NATIVE}))
register(Operation("cross_entropy_", "atp_kernels.backends", ("reference", "native"), {"cpu": NATIVE}))

__all__ = [
    "ACTIVATIONS",
    "MlpSpec",
    "Swiglu",
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
]
