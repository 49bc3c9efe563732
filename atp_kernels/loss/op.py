"""torch.library registration of cross-entropy, for eager and compiled programs alike."""

import torch
from torch import Tensor

from atp_kernels.call import Operation, Order, register, select

OPERATION = register(
    Operation(
        name="cross_entropy_",
        package=__package__,
        backends=("reference", "native"),
        # On CUDA `atp` uses liger-kernel where it is installed.
        order={"cpu": Order(("native", "reference"))},
    )
)


@torch.library.custom_op("atp_kernels::cross_entropy_", mutates_args=("logits",))
def cross_entropy_op(logits: Tensor, targets: Tensor, backend: str) -> Tensor:
    """Losses of all rows; logits become the gradient of their sum."""
    return select("cross_entropy_", logits.device, logits.dtype, backend).module.cross_entropy_(logits, targets)


@cross_entropy_op.register_fake
def _(logits, targets, backend):
    wide = torch.promote_types(logits.dtype, torch.float32)
    return logits.new_empty(targets.shape, dtype=wide)
