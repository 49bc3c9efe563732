"""The LoRA layer that knows masks: a stock PEFT `Linear` whose forward is one call into `atp_kernels`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import Linear as PeftLinear
from torch import Tensor, nn

from atp.masks.space import MaskSpace
from atp.rng import seeded
from atp_kernels import masked_lora_linear

ADAPTER = "default"


class MaskedLoraLinear(PeftLinear):
    """PEFT LoRA linear with masks on its outputs [out_features] and inputs [in_features].

    Masks are state of the current pass, not parameters: bool (hard) or float32 (soft, differentiable), None keeps all.
    With `mask_lora` they cover base and LoRA path, without it the base path alone (1-method.md section 3).
    """

    def __init__(self, base_layer: nn.Module, adapter_name: str, **kwargs: Any) -> None:
        super().__init__(base_layer, adapter_name, **kwargs)
        self.set_masks(None, None)

    def set_masks(self, out_mask: Tensor | None, in_mask: Tensor | None, *, mask_lora: bool = False) -> None:
        """Sets the masks of the next passes; they stay until the next call."""
        self.out_mask, self.in_mask, self.mask_lora = out_mask, in_mask, mask_lora

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if self.disable_adapters or self.merged or self.active_adapters != [ADAPTER]:
            if self.out_mask is not None or self.in_mask is not None:
                raise RuntimeError("masks are set on a merged or disabled LoRA layer: clear them with set_masks first")
            return super().forward(x, *args, **kwargs)
        base = self.get_base_layer()
        dropout = self.lora_dropout[ADAPTER]
        # Decisions are judged on the whole adapter: no dropout where the mask covers the sum.
        drops = self.training and isinstance(dropout, nn.Dropout) and not self.mask_lora
        return masked_lora_linear(
            x,
            base.weight,
            self.lora_A[ADAPTER].weight,
            self.lora_B[ADAPTER].weight,
            scaling=self.scaling[ADAPTER],
            out_mask=self.out_mask,
            in_mask=self.in_mask,
            mask_lora=self.mask_lora,
            bias=base.bias,
            lora_input=dropout(x) if drops else None,
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


class MaskController:
    """Hands the masks of a flat vector to the LoRA layers of a model, in one of the three forms of the method."""

    def __init__(self, model: nn.Module, space: MaskSpace) -> None:
        self.space = space
        self._layers = {}
        for name, module in model.named_modules():
            if isinstance(module, MaskedLoraLinear):
                layer, local = name.split(".layers.")[-1].split(".", 1)
                self._layers[int(layer), local] = module
        missing = space.num_layers * len(space.linears) - len(self._layers)
        if missing:
            raise RuntimeError(f"{missing} linears of the mask space carry no MaskedLoraLinear: wrap with add_lora")

    def clear(self) -> None:
        """Back to the plain LoRA model."""
        for layer in self._layers.values():
            layer.set_masks(None, None)

    def set(self, mask: Tensor, form: Literal["soft", "hard", "sum"]) -> None:
        """mask [space.size]; see `masks` for the forms."""
        for layer, module, out_mask, in_mask in self.space.module_masks(mask):
            if form == "soft":
                # Producers are masked at their output, so the input side of o and down is masked already.
                in_mask = None
            self._layers[layer, module].set_masks(out_mask, in_mask, mask_lora=form != "hard")

    @contextmanager
    def masks(self, mask: Tensor, form: Literal["soft", "hard", "sum"]) -> Iterator[None]:
        """Applies a mask for the duration of a with block.

        soft: decision step, float mask on the sum, output side only. hard: LoRA step, bool mask on the base path only,
        both sides. sum: evaluation before the cut, bool mask on the sum, which is what the cut model computes.
        """
        self.set(mask, form)
        try:
            yield
        finally:
            self.clear()
