"""Layers as the Hugging Face library `kernels` takes them: each lends its `forward` to a layer of a model.

`kernels.kernelize` calls such a forward with the model's own module as self, so a layer here has no constructor and no
state: its annotations name the attributes that it reads.
"""

from torch import Tensor, nn

from atp_kernels import nn as modules
from atp_kernels.norm import rms_norm


class RMSNorm(nn.Module):
    """`rms_norm` for norms with transformers' attributes, such as LlamaRMSNorm, whose layer name is "RMSNorm" too.

    weight [K], floating; variance_epsilon is added to the mean square. The product with the weight is rounded once,
    where LlamaRMSNorm rounds before it as well.
    """

    can_torch_compile = True
    weight: Tensor
    variance_epsilon: float

    def forward(self, hidden_states: Tensor) -> Tensor:
        """hidden_states [..., K] to the same shape and dtype; errors as in `rms_norm`."""
        return rms_norm(hidden_states, self.weight, eps=self.variance_epsilon)


class MaskedLoRALinear(nn.Module):
    """`masked_lora_linear` for layers with the attributes of `atp_kernels.nn.MaskedLoRALinear`, which explains them."""

    can_torch_compile = True
    weight: Tensor
    bias: Tensor | None
    lora_A: Tensor
    lora_B: Tensor
    scaling: float
    dropout: float
    mask_lora: bool
    out_mask: Tensor | None
    in_mask: Tensor | None

    forward = modules.MaskedLoRALinear.forward
