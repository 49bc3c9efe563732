"""The 100 % mark: the uncut model tuned with stock PEFT LoRA on the same samples, in the same order."""

from __future__ import annotations

from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from torch.utils.data import Dataset
from transformers import Trainer, TrainerCallback

from atp.config import ATPConfig
from atp.data import collate
from atp.models.attention import use_training_attention
from atp.training.arguments import training_arguments
from atp.training.callbacks import ClockCallback
from atp.training.loss import causal_lm_loss
from atp.training.metrics import PhaseClock
from atp.training.order import RunOrder, run_order
from atp.training.precision import autocast_dtype

PHASE = "dense_lora"


class DenseLoraTrainer(Trainer):
    """Stock LoRA on the linears that ATP tunes, with ATP's optimizer settings, order of samples, loss and precision."""

    def __init__(
        self,
        config: ATPConfig,
        model: nn.Module,
        train_dataset: Dataset,
        linears: list[str],
        callbacks: list[TrainerCallback] | None = None,
    ) -> None:
        size = config.training.batch_size
        total = config.training.total * size * config.training.gradient_accumulation
        self.order = run_order(train_dataset, size, total, config.seed)
        self.autocast = autocast_dtype(config.training.precision)
        lora = config.lora
        torch.manual_seed(config.seed)
        settings = LoraConfig(
            r=lora.r, lora_alpha=lora.alpha, lora_dropout=lora.dropout, target_modules=linears, task_type="CAUSAL_LM"
        )
        args = training_arguments(config)
        args.save_strategy = "no"
        super().__init__(
            model=get_peft_model(model, settings), args=args, train_dataset=train_dataset, data_collator=collate
        )
        use_training_attention(model)
        self.clock = PhaseClock()
        self._counter = ClockCallback(self.clock, lambda step: PHASE)
        self.add_callback(self._counter)
        for callback in callbacks or []:
            self.add_callback(callback)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:
            logs["tokens_per_second"] = self.clock.rate(PHASE)
        super().log(logs, start_time)

    def _get_train_sampler(self, train_dataset: Dataset | None = None) -> RunOrder:
        return self.order

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        self._counter.count(inputs["tokens"])
        loss = causal_lm_loss(model, inputs, num_items_in_batch)
        return (loss, {"loss": loss}) if return_outputs else loss

    def compute_loss_context_manager(self) -> Any:
        return torch.autocast(self.args.device.type, dtype=self.autocast, enabled=self.autocast is not None)

    def restore(self) -> nn.Module:
        """The untouched base model, without the adapter."""
        model: PeftModel = self.model
        return model.unload()
