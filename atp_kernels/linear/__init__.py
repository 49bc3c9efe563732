"""The masked LoRA linear: base product, adapter, masks, bias and dropout as one operation with all its gradients."""

from torch import Tensor

from atp_kernels.checks import check_dropout
from atp_kernels.kinds import typed
from atp_kernels.linear import op
from atp_kernels.linear.operands import Operands, prepare


@typed
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
    dropout: float = 0.0,
    seed: int | Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """y = m_out * ((m_in * x) W^T + bias) + scaling * (lora_input A^T) B^T, with all its gradients.

    With `mask_lora` the output mask covers the sum and the adapter reads the in-masked input too.

    x [..., in]; weight [out, in]; lora_a [r, in]; lora_b [out, r]; out_mask [out]; in_mask [in]; bias [out];
    lora_input like x (default x). Returns [..., out] in the dtype of x. Masks are bool (hard, constant) or floating
    (soft, differentiable, used in float32 whatever x is). x and weight share a dtype; the factors, bias and lora_input
    are cast to it. Under autocast all but the masks are cast to the autocast dtype; there a constant adapter may be
    added to a float32 weight before the cast, which rounds once where two paths round twice.
    weight may be a `QuantizedWeight` (NF4, fp8 or int8, frozen): each call dequantises it, and its backward pass again,
    so that no floating copy is kept; a compiler is refused.
    `dropout` p in [0, 1) makes lora_input = keep * x / (1 - p), in place of a given one, and gradients flow to x
    through the same keep. Seeing x as a matrix, element (m, k) is kept where word k % 4 of Philox-4x32-7 with counter
    (m, k // 4, 0, 0) and key `seed` is at least floor(p * 2^32), so that backward draws it again and nothing of it is
    stored. `seed`: an int64 as an int, or as a 0-d tensor, for which torch.compile compiles once: on the CPU, or on x's
    device, which a CUDA graph needs. A seed drops the same elements each time, so give each call of a step its own, and
    leave a tensor as it is until backward. `new_seed` draws one.
    With "auto" a frozen weight under bool masks may be sliced by the call, which then reads nothing that they remove,
    and a tuned table decides where there is one (docs/kernels.md).
    Differentiable once in every floating input that requires it. Raises ValueError for wrong shapes, dtypes, devices or
    dropout and RuntimeError for a named backend that cannot take the call.
    Source: arXiv 2412.14426, section 3; Philox: Salmon et al. 2011.

    >>> x, weight = torch.ones(2, 3), torch.ones(4, 3)
    >>> lora_a, lora_b = torch.ones(1, 3), torch.ones(4, 1)
    >>> keep = torch.tensor([True, True, False, False])
    >>> masked_lora_linear(x, weight, lora_a, lora_b, scaling=0.5, out_mask=keep)[0]  # the adapter is not masked
    tensor([4.5000, 4.5000, 1.5000, 1.5000])
    >>> masked_lora_linear(x, weight, lora_a, lora_b, scaling=0.5, out_mask=keep, mask_lora=True)[0]
    tensor([4.5000, 4.5000, 0.0000, 0.0000])
    """
    operands, merge = Operands(x, weight, lora_a, lora_b, bias, lora_input, out_mask, in_mask), None
    if dropout != 0:
        check_dropout(x, dropout, seed, lora_input)
    elif mask_lora or (out_mask is None and in_mask is None):
        merge = float(scaling)
    operands = prepare(operands, merge=merge, backend=backend)
    return op.linear(operands, float(scaling), mask_lora, float(dropout), seed, backend, lora_a.shape[0])
