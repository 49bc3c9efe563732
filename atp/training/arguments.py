"""The `TrainingArguments` that a config stands for."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from transformers import TrainingArguments, integrations

from atp.config import ATPConfig
from atp.errors import InputError, shorten


def check_trackers(names: Sequence[str]) -> None:
    """Refuses `training.report_to` where transformers knows no tracker of a name, or its package is missing."""
    known = integrations.INTEGRATION_TO_CALLBACK
    available = integrations.get_available_reporting_integrations()
    for name in names:
        if name in ("all", "none") and len(names) == 1:
            continue
        if name not in known:
            raise InputError(
                f"training.report_to: there is no tracker '{shorten(name)}': use some of {', '.join(sorted(known))}"
            )
        if name not in available:
            raise InputError(
                f"training.report_to: tracker '{name}' is not installed: install its package or leave it out"
            )


def training_arguments(config: ATPConfig) -> TrainingArguments:
    """Arguments for Trainer's loop. Precision is not among them: the trainers enter autocast themselves."""
    training = config.training
    return TrainingArguments(
        output_dir=config.output_dir,
        max_steps=training.total,
        per_device_train_batch_size=training.batch_size,
        gradient_accumulation_steps=training.gradient_accumulation,
        learning_rate=training.lr,
        lr_scheduler_type={"constant": "constant_with_warmup"}.get(training.schedule, training.schedule),
        warmup_steps=training.warmup,
        max_grad_norm=training.clip,
        logging_steps=training.log_every,
        logging_nan_inf_filter=False,
        save_strategy="steps",
        save_steps=training.save_every,
        report_to=training.report_to,
        disable_tqdm=True,
        remove_unused_columns=False,
        seed=config.seed,
        dataloader_drop_last=True,
        use_cpu=not torch.accelerator.is_available(),  # several processes on CPUs are alone together without it
        dataloader_pin_memory=torch.cuda.is_available(),
    )
