"""The LoRA linear on a kept slice in plain PyTorch: hard masks on the base path of the masked one."""

from torch import Tensor

from atp_kernels.dropout.definition import Dropout
from atp_kernels.linear import definition


def kept_lora_linear(
    x: Tensor,
    weight: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    *,
    scaling: float,
    out_mask: Tensor | None = None,
    in_mask: Tensor | None = None,
    bias: Tensor | None = None,
    lora_input: Tensor | None = None,
    dropout: Dropout | None = None,
) -> Tensor:
    """y[:, R] = x[:, C] W[R, C]^T + bias[R] and 0 elsewhere, plus scaling * (lora_input A^T) B^T on the whole width.

    R and C are the positions that the bool masks keep; x, lora_input and y lie in the order of the model.
    lora_input is x where it is not given, after `dropout`.
    Source: arXiv 2412.14426, section 3 (LoRA step).
    """
    return definition.masked_lora_linear(
        x,
        weight,
        lora_a,
        lora_b,
        scaling=scaling,
        out_mask=out_mask,
        in_mask=in_mask,
        bias=bias,
        lora_input=lora_input,
        dropout=dropout,
    )
