"""torch.library registration of compaction, for eager and compiled programs alike."""

import torch
from torch import Tensor

from atp_kernels.call import Operation, Order, register, select
from atp_kernels.compaction.definition import round_up

OPERATION = register(
    Operation(
        name="compact",
        package=__package__,
        backends=("reference", "native"),
        order={"cpu": Order(("native", "reference")), "cuda": Order(("native", "reference"))},
    )
)


@torch.library.custom_op("atp_kernels::compact", mutates_args=())
def compact_op(weight: Tensor, rows: Tensor | None, cols: Tensor | None, pad_to: int, backend: str) -> Tensor:
    """The kept rows and columns, gathered sides padded with zeros."""
    return select("compact", weight.device, weight.dtype, backend).module.compact(weight, rows, cols, pad_to)


@compact_op.register_fake
def _(weight, rows, cols, pad_to, backend):
    n_rows = weight.shape[0] if rows is None else round_up(rows.shape[0], pad_to)
    n_cols = weight.shape[1] if cols is None else round_up(cols.shape[0], pad_to)
    return weight.new_empty(n_rows, n_cols)
