"""LoRA tuning of a model that stays as it is: the second stage of every two-stage method, and the dense mark."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import nn
from torch.utils.data import Dataset
from transformers import Trainer, TrainerCallback, set_seed

from atp.config import ATPConfig
from atp.data import collate
from atp.errors import Interrupted
from atp.models.attention import use_training_attention
from atp.training import checkpoint as checkpoints
from atp.training.arguments import training_arguments
from atp.training.callbacks import ClockCallback, PhaseCallback
from atp.training.checkpoint import Checkpoint
from atp.training.guards import FiniteGuard, SignalGuard
from atp.training.loss import causal_lm_loss
from atp.training.metrics import MetricsLog, PhaseClock
from atp.training.order import RunOrder, run_order
from atp.training.phases import Phases
from atp.training.precision import autocast_dtype


class LoraTuner(Trainer):
    """Trains the adapter of a PEFT model with ATP's optimizer, samples, loss, precision, guards and checkpoints.

    The number of LoRA steps is that of a whole ATP run (`training.total`), so both see the same samples. folder holds
    metrics.jsonl and checkpoints/; phase names the steps in the records. train_dataset yields dictionaries with
    `input_ids` and `labels` int64 [length], as the datasets of `atp.data` do.
    """

    def __init__(
        self,
        config: ATPConfig,
        model: PeftModel,
        train_dataset: Dataset,
        folder: Path,
        *,
        phase: str = "tune",
        callbacks: Sequence[TrainerCallback] = (),
    ) -> None:
        self.config, self.phase = config, phase
        self.phases = Phases(search=0, settle=0, tune=config.training.total)
        self.checkpoint_root = folder / "checkpoints"
        self.metrics = MetricsLog(folder / "metrics.jsonl")
        self.clock = PhaseClock()
        self.finite = FiniteGuard(config.training.max_bad_steps)
        self.signals = SignalGuard()
        self.autocast_dtype = autocast_dtype(config.training.precision)
        args = training_arguments(config)
        super().__init__(model=model, args=args, train_dataset=train_dataset, data_collator=collate)
        use_training_attention(model)
        self.add_callback(PhaseCallback(self))
        self._counter = ClockCallback(self.clock, lambda step: phase)
        self.add_callback(self._counter)
        for callback in callbacks:
            self.add_callback(callback)
        if config.training.gradient_checkpointing:
            enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
            enable()

    def train(self, resume: bool = False, **_: Any) -> None:
        """Trains to the end, from the newest complete checkpoint if resume is set and there is one.

        Raises `Interrupted` after a signal (with a checkpoint written) and `NotReached` when losses stay non-finite.
        """
        path = checkpoints.newest(self.checkpoint_root) if resume else None
        set_seed(self.config.seed)  # whatever this process drew before must not matter
        step = 0
        if path is not None:
            state = checkpoints.load(path)
            self.config.refuse_change_of(state.meta["config"])
            self.clock.load(state.meta["clock"])
            self.finite.restore(state.meta["skipped"])
            self.autocast_dtype = autocast_dtype(state.meta["precision"])
            step = state.step
        self.metrics.rewind(step)
        if step < self.phases.total:
            with self.signals:
                super().train(resume_from_checkpoint=str(path) if path else None)
            if self.signals.received is not None:
                raise Interrupted(self.signals.received, str(checkpoints.newest(self.checkpoint_root)))
        else:
            self._load_from_checkpoint(str(path))

    def compute_loss_context_manager(self) -> Any:
        enabled = self.autocast_dtype is not None
        return torch.autocast(self.args.device.type, dtype=self.autocast_dtype, enabled=enabled)

    def _get_train_sampler(self, train_dataset: Dataset | None = None) -> RunOrder:
        size = self.args.train_batch_size
        total = self.phases.total * size * self.args.gradient_accumulation_steps * self.args.world_size
        return run_order(self.train_dataset, size, total, self.config.seed)

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        self._counter.count(inputs["tokens"] * self.args.world_size)
        loss = causal_lm_loss(model, inputs, num_items_in_batch)
        if num_items_in_batch is not None:
            loss = loss * self.accelerator.num_processes  # the count is that of all processes, the gradients' mean too
        return (loss, {"loss": loss}) if return_outputs else loss

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        if self.optimizer is None:
            named = {n: p for n, p in self.model.named_parameters() if p.requires_grad}
            self._trained = list(named)
            self.adamw = torch.optim.AdamW(named.values(), lr=self.args.learning_rate, weight_decay=0.0, fused=True)
            self.optimizer = self.adamw
        return self.optimizer

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:
            self.finite.report()
            logs["tokens_per_second"] = self.clock.rate(self.phase)
            record = {"loss": logs["loss"], "lr": logs["learning_rate"], "tokens_per_second": logs["tokens_per_second"]}
            seconds = sum(self.clock.seconds.values())
            self.metrics.write({"step": self.state.global_step, "phase": self.phase, **record, "seconds": seconds})
        super().log(logs, start_time)

    # Checkpoints, in ATP's own format

    def _save_checkpoint(self, model: nn.Module, trial: Any = None) -> None:
        if self.args.should_save:
            checkpoints.save(self.checkpoint_root, self._checkpoint(), keep=self.config.training.keep_checkpoints)

    def _checkpoint(self) -> Checkpoint:
        tensors = {f"model.{n}": p for n, p in self.model.named_parameters() if p.requires_grad}
        moments = checkpoints.optimizer_tensors(self.optimizer, self._trained)
        tensors |= {f"lora_optimizer.{name}": tensor for name, tensor in moments.items()}
        tensors["rng.cpu"] = torch.get_rng_state()
        if self.args.device.type == "cuda":
            tensors["rng.cuda"] = torch.cuda.get_rng_state(self.args.device)
        meta = {
            "config": self.config.model_dump(mode="json"),
            "clock": self.clock.state(),
            "skipped": self.finite.skipped,
            "precision": "float32" if self.autocast_dtype is None else "bfloat16",
            "scheduler": self.lr_scheduler.state_dict(),
        }
        return Checkpoint(self.state.global_step, tensors, meta, checkpoints.trainer_state_json(self.state))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        saved = checkpoints.load(Path(resume_from_checkpoint)).part("model")
        with torch.no_grad():
            for name, parameter in self.model.named_parameters():
                if parameter.requires_grad:
                    parameter.copy_(saved[name])

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is not None:
            state = checkpoints.load(Path(checkpoint))
            checkpoints.load_optimizer_tensors(self.optimizer, self._trained, state.part("lora_optimizer"))
            self.lr_scheduler.load_state_dict(state.meta["scheduler"])
            for group, lr in zip(self.optimizer.param_groups, self.lr_scheduler.get_last_lr(), strict=True):
                group["lr"] = lr

    def _load_rng_state(self, checkpoint: str | None) -> None:
        if checkpoint is not None:
            rng = checkpoints.load(Path(checkpoint)).part("rng")
            torch.set_rng_state(rng["cpu"])
            if "cuda" in rng:
                torch.cuda.set_rng_state(rng["cuda"], self.args.device)
