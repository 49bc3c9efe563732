"""torch.library registration of cross-entropy, for eager and compiled programs alike."""

import torch
from torch import Tensor

from atp_kernels.call import Operation, Order, register, select
from atp_kernels.checks import check_places

OPERATION = register(
    Operation(
        name="cross_entropy_",
        package=__package__,
        backends=("reference", "triton", "native"),
        # Two passes where ATen makes six, over a float32 copy.
        order={"cpu": Order(("native", "reference")), "cuda": Order(("triton", "reference"))},
    )
)


@torch.library.custom_op("atp_kernels::cross_entropy_", mutates_args=("logits",))
def cross_entropy_op(logits: Tensor, targets: Tensor, backend: str) -> Tensor:
    """Losses of all rows; logits become the gradient of their sum."""
    # Here, where a compiled program comes by too.
    check_places("logits", logits)
    return select("cross_entropy_", logits.device, logits.dtype, backend).module.cross_entropy_(logits, targets)


@cross_entropy_op.register_fake
def _(logits, targets, backend):
    wide = torch.promote_types(logits.dtype, torch.float32)
    return logits.new_empty(targets.shape, dtype=wide)
