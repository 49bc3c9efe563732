"""The 100 % mark: the uncut model with a stock PEFT LoRA adapter on the linears that ATP tunes."""

from __future__ import annotations

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import PreTrainedModel

from atp.config import ATPConfig
from atp.spaces.space import MaskSpace

PHASE = "dense_lora"


def stock_lora(model: PreTrainedModel, config: ATPConfig) -> PeftModel:
    """Wraps the model in PEFT's own layers, initialized from the run's seed; `unload()` returns the model."""
    lora = config.lora
    names = sorted({name.rsplit(".", 1)[-1] for name in MaskSpace.from_config(model.config).linears})
    torch.manual_seed(config.seed)
    settings = LoraConfig(
        r=lora.r,
        lora_alpha=lora.alpha,  # type: ignore[arg-type]  # declared int, and any number works
        lora_dropout=lora.dropout,
        target_modules=names,
        task_type="CAUSAL_LM",
    )
    return get_peft_model(model, settings)
