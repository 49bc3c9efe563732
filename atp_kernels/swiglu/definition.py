"""The gated MLP of masked LoRA linears in plain PyTorch: the definition every backend is held to."""

from functools import partial

from torch import Tensor
from torch.nn import functional as F

from atp_kernels.dropout.definition import Dropout
from atp_kernels.linear.definition import masked_lora_linear
from atp_kernels.projection import Projection


def masked_lora_swiglu(
    x: Tensor,
    gate: Projection,
    up: Projection,
    down: Projection,
    *,
    activation: str = "silu",
    mask: Tensor | None = None,
    mask_lora: bool = False,
    dropouts: tuple[Dropout | None, Dropout | None] = (None, None),
) -> Tensor:
    """down(act(gate(x)) * up(x)); the mask [channels] covers gate and up, without `mask_lora` the input of down too.

    Producers whose sums are masked leave zeros at the input of down: it needs no mask then. dropouts: of what the
    adapters of gate and up read, and that of down.
    Source: Shazeer 2020, "GLU variants improve transformer"; masks: arXiv 2412.14426, section 3.
    """
    act = F.silu if activation == "silu" else partial(F.gelu, approximate="tanh")
    g, u = (
        masked_lora_linear(
            x, w, a, b, scaling=scaling, bias=bias, out_mask=mask, mask_lora=mask_lora, dropout=dropouts[0]
        )
        for w, a, b, scaling, bias in (gate, up)
    )
    weight, lora_a, lora_b, scaling, bias = down
    in_mask = None if mask_lora else mask
    return masked_lora_linear(
        act(g) * u, weight, lora_a, lora_b, scaling=scaling, in_mask=in_mask, bias=bias, dropout=dropouts[1]
    )
