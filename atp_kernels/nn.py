"""Modules over the operations, for models that are not wrapped by PEFT."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from atp_kernels.dropout import new_seed
from atp_kernels.kinds import typed
from atp_kernels.linear import masked_lora_linear
from atp_kernels.quantized import dense


class MaskedLoRALinear(nn.Module):
    """A frozen linear with a LoRA adapter, masked on its outputs and inputs: `masked_lora_linear` as a module.

    weight [out, in], which may be a `QuantizedWeight`, and bias [out] are shared with the caller and frozen; lora_A
    [r, in] and lora_B [out, r] are trained, initialised as PEFT does (Kaiming-uniform and zero), float32 where the
    weight is of 16 bits. scaling is alpha / r. `dropout` of the adapter's input, in training alone, takes its seed from
    torch's CPU generator.

    out_mask [out] and in_mask [in] are buffers, None for no mask: assign bool (hard) or floating (soft, differentiable)
    tensors. `mask_lora` makes them cover the adapter too. A state dict holds the masks that are set, and loading one
    sets those it holds and clears the others. Raises ValueError for a weight or bias of another shape or dtype, an r
    below 1 or a dropout outside [0, 1).

    >>> layer = MaskedLoRALinear.from_linear(nn.Linear(3, 4), r=2, alpha=4)
    >>> layer.out_mask = torch.tensor([True, True, False, False])
    >>> y, merged = layer(torch.ones(5, 3)), layer.merge()
    >>> torch.allclose(y, merged(torch.ones(5, 3)))
    True
    """

    out_mask: Tensor | None
    in_mask: Tensor | None

    @typed
    def __init__(
        self,
        weight: Tensor,
        bias: Tensor | None = None,
        *,
        r: int,
        alpha: float,
        dropout: float = 0.0,
        mask_lora: bool = False,
    ) -> None:
        super().__init__()
        if weight.ndim != 2 or not weight.is_floating_point() or weight.element_size() < 2:
            given = f"{weight.dtype} of shape {list(weight.shape)}"
            raise ValueError(f"weight must be a 2-D floating tensor, not {given}.")
        if bias is not None and (bias.shape != weight.shape[:1] or bias.device != weight.device):
            given = f"of shape {list(bias.shape)} on {bias.device}"
            raise ValueError(f"bias is {given}, but the weight needs [{len(weight)}] on {weight.device}.")
        if r < 1:
            raise ValueError(f"r is {r}: give a rank of at least 1.")
        if not 0 <= dropout < 1:
            raise ValueError(f"dropout is {dropout}: give a probability of at least 0 and below 1.")
        self.r, self.alpha, self.dropout, self.mask_lora = r, alpha, dropout, mask_lora
        self.weight = nn.Parameter(weight.detach(), requires_grad=False)
        self.bias = None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)
        kind: dict[str, Any] = {"device": weight.device, "dtype": torch.promote_types(weight.dtype, torch.float32)}
        self.lora_A = nn.Parameter(torch.empty(r, weight.shape[1], **kind))
        self.lora_B = nn.Parameter(torch.empty(weight.shape[0], r, **kind))
        self.register_buffer("out_mask", None)
        self.register_buffer("in_mask", None)
        self.reset_parameters()

    @classmethod
    @typed
    def from_linear(cls, linear: nn.Linear, **options: Any) -> MaskedLoRALinear:
        """The layer over the weight and bias of a linear; the options are those of the constructor."""
        return cls(linear.weight, linear.bias, **options)

    @property
    def scaling(self) -> float:
        """alpha / r, the weight of the adapter's product."""
        return self.alpha / self.r

    def reset_parameters(self) -> None:
        """Start the adapter anew: its product is zero."""
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))
        nn.init.zeros_(self.lora_B)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in] to [..., out]; dtypes, autocast and errors as in `masked_lora_linear`."""
        dropout = self.dropout if self.training else 0.0
        return masked_lora_linear(
            x,
            self.weight,
            self.lora_A,
            self.lora_B,
            scaling=self.scaling,
            out_mask=self.out_mask,
            in_mask=self.in_mask,
            mask_lora=self.mask_lora,
            bias=self.bias,
            dropout=dropout,
            seed=new_seed(x) if dropout else None,
        )

    @torch.no_grad()
    def merge(self) -> nn.Linear:
        """A plain linear that computes what this layer does without dropout: masks and adapter in its own new weight.

        Summed in the dtype of the factors or of soft masks, and rounded once to that of the weight.
        """
        base, adapter = dense(self.weight).to(self.lora_B.dtype), self.scaling * (self.lora_B @ self.lora_A)
        merged = self._masked(base + adapter) if self.mask_lora else self._masked(base) + adapter
        n_out, n_in = self.weight.shape
        linear = nn.Linear(n_in, n_out, bias=self.bias is not None, device="meta")
        linear.weight = nn.Parameter(merged.to(self.weight.dtype))
        if self.bias is not None:
            bias = self.bias if self.out_mask is None else self.bias * self.out_mask
            linear.bias = nn.Parameter(bias.to(self.bias.dtype, copy=True))
        return linear

    def _masked(self, matrix: Tensor) -> Tensor:
        matrix = matrix if self.out_mask is None else matrix * self.out_mask.unsqueeze(1)
        return matrix if self.in_mask is None else matrix * self.in_mask

    def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str, *rest: Any) -> None:
        for name in ("out_mask", "in_mask"):
            saved = state_dict.get(prefix + name)
            setattr(self, name, None if saved is None else torch.empty_like(saved, device=self.weight.device))
        super()._load_from_state_dict(state_dict, prefix, *rest)

    def extra_repr(self) -> str:
        n_out, n_in = self.weight.shape
        masks = [name for name in ("out_mask", "in_mask") if getattr(self, name) is not None]
        options = f"r={self.r}, alpha={self.alpha}, dropout={self.dropout}, mask_lora={self.mask_lora}"
        return ", ".join([f"in_features={n_in}, out_features={n_out}, bias={self.bias is not None}", options, *masks])
