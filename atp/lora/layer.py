"""The LoRA layer that knows masks: a stock PEFT `Linear` whose forward is one call into `atp_kernels`."""

from __future__ import annotations

from typing import Any

from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import Linear as PeftLinear
from torch import Tensor, nn

from atp.masks.space import MaskSpace
from atp.rng import seeded
from atp_kernels import KeptSlice, kept_lora_linear, masked_lora_linear

ADAPTER = "default"


class MaskedLoraLinear(PeftLinear):
    """PEFT LoRA linear with masks on its outputs [out_features] and inputs [in_features].

    Masks are state of the current pass, not parameters: bool (hard) or float32 (soft, differentiable), None keeps all.
    With `mask_lora` they cover base and LoRA path, without it the base path alone (1-method.md section 3). A kept
    slice stands for hard masks on the base path, at the cost of what they keep.
    """

    def __init__(self, base_layer: nn.Module, adapter_name: str, **kwargs: Any) -> None:
        super().__init__(base_layer, adapter_name, **kwargs)
        self.set_masks(None, None)

    def set_masks(
        self,
        out_mask: Tensor | None,
        in_mask: Tensor | None,
        *,
        mask_lora: bool = False,
        kept: KeptSlice | None = None,
    ) -> None:
        """Sets the masks of the next passes, or the slice that stands for them; they stay until the next call."""
        self.out_mask, self.in_mask, self.mask_lora, self.kept = out_mask, in_mask, mask_lora, kept

    @property
    def plain(self) -> bool:
        """Whether this is neither merged nor disabled: one adapter beside its frozen base."""
        return not (self.disable_adapters or self.merged) and self.active_adapters == [ADAPTER]

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if not self.plain:
            if self.out_mask is not None or self.in_mask is not None or self.kept is not None:
                raise RuntimeError("masks are set on a merged or disabled LoRA layer: clear them with set_masks first")
            return super().forward(x, *args, **kwargs)
        base = self.get_base_layer()
        dropout = self.lora_dropout[ADAPTER]
        # Decisions are judged on the whole adapter: no dropout where the mask covers the sum.
        drops = self.training and isinstance(dropout, nn.Dropout) and not self.mask_lora
        factors = self.lora_A[ADAPTER].weight, self.lora_B[ADAPTER].weight
        adapter = {"scaling": self.scaling[ADAPTER], "lora_input": dropout(x) if drops else None}
        if self.kept is not None:
            return kept_lora_linear(x, self.kept, *factors, **adapter)
        return masked_lora_linear(
            x,
            base.weight,
            *factors,
            **adapter,
            out_mask=self.out_mask,
            in_mask=self.in_mask,
            mask_lora=self.mask_lora,
            bias=base.bias,
        )


def add_lora(model: nn.Module, space: MaskSpace, *, r: int, alpha: float, dropout: float, seed: int = 0) -> PeftModel:
    """Wraps a causal LM in a stock PEFT LoRA adapter on all linears of the space, with masked layers.

    The adapter that is saved is plain LoRA: the custom layer is registered on the config, not written to it.
    """
    config = LoraConfig(
        r=r,
        lora_alpha=alpha,
        lora_dropout=dropout,
        target_modules=sorted({name.rsplit(".", 1)[-1] for name in space.linears}),
        task_type="CAUSAL_LM",
    )
    config._register_custom_module({nn.Linear: MaskedLoraLinear})
    with seeded(seed):
        return get_peft_model(model, config)
