"""The projections of attention in plain PyTorch."""

from collections.abc import Sequence

from torch import Tensor

from atp_kernels.dropout.definition import Dropout
from atp_kernels.linear.definition import masked_lora_linear
from atp_kernels.projection import Projection


def masked_lora_qkv(
    x: Tensor,
    *linears: Projection,
    masks: Sequence[Tensor | None],
    mask_lora: bool = False,
    dropout: Dropout | None = None,
) -> tuple[Tensor, ...]:
    """Masked LoRA linears of one x, each with the mask of its outputs; their adapters read one `dropout` of x."""
    return tuple(
        masked_lora_linear(x, w, a, b, scaling=scaling, bias=bias, out_mask=mask, mask_lora=mask_lora, dropout=dropout)
        for (w, a, b, scaling, bias), mask in zip(linears, masks, strict=True)
    )
