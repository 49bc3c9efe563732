"""The masked LoRA linear in plain PyTorch: the definition every backend is held to."""

from torch import Tensor

from atp_kernels.call import matrix
from atp_kernels.dropout.definition import Dropout, dropped


def masked_lora_linear(
    x: Tensor,
    weight: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    *,
    scaling: float,
    out_mask: Tensor | None = None,
    in_mask: Tensor | None = None,
    mask_lora: bool = False,
    bias: Tensor | None = None,
    lora_input: Tensor | None = None,
    dropout: Dropout | None = None,
) -> Tensor:
    """y = m_out * ((m_in * x) W^T + bias) + scaling * (lora_input A^T) B^T; `mask_lora` masks the sum.

    x [..., in], weight [out, in], lora_a [r, in], lora_b [out, r], out_mask [out], in_mask [in], bias [out];
    lora_input is x where it is not given, after `dropout` of x seen as a matrix.
    Source: arXiv 2412.14426, section 3; the masked sum is its decision step, the masked base path its LoRA step.
    """
    if dropout is not None:
        lora_input = dropped(matrix(x), dropout).view(x.shape)
    adapter_input = x if lora_input is None else lora_input
    if mask_lora:
        adapter_input = _masked(adapter_input, in_mask)
    base = _masked(x, in_mask) @ weight.T
    if bias is not None:
        base = base + bias
    adapter = scaling * (adapter_input @ lora_a.T @ lora_b.T)
    return _masked(base + adapter, out_mask) if mask_lora else _masked(base, out_mask) + adapter


def _masked(values: Tensor, mask: Tensor | None) -> Tensor:
    return values if mask is None else (values * mask).to(values.dtype)
