"""`LoraTrainer`: transformers' Trainer with what every run of this project shares, whatever it trains towards."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerBase, Trainer, TrainerCallback
from transformers.trainer_utils import align_special_tokens

from atp import processes
from atp.config import ATPConfig
from atp.data import collate
from atp.errors import InputError, Interrupted
from atp.finite import FiniteGuard, refuse_weights
from atp.models.attention import use_training_attention
from atp.signals import SignalGuard
from atp.training import checkpoint as checkpoints
from atp.training.arguments import training_arguments
from atp.training.callbacks import ClockCallback, PhaseCallback
from atp.training.checkpoint import Checkpoint, resume_point
from atp.training.decision_state import prefixed
from atp.training.fingerprints import fingerprints, refuse_other_inputs
from atp.training.loss import causal_lm_loss
from atp.training.metrics import MetricsLog, PhaseClock
from atp.training.order import RunOrder, run_order
from atp.training.phases import Phases
from atp.training.precision import autocast_dtype


class LoraTrainer(Trainer):
    """Trains the adapter of a PEFT model: one optimizer, order of samples, precision, guards, records and checkpoints.

    phases says how many LoRA steps there are; phase_of names a step in records, by default as phases does. folder holds
    metrics.jsonl and checkpoints/. train_dataset yields dictionaries with `input_ids` and `labels` int64 [length], as
    the datasets of `atp.data` do.
    """

    def __init__(
        self,
        config: ATPConfig,
        model: PeftModel,
        train_dataset: Dataset,
        folder: Path,
        phases: Phases,
        *,
        phase_of: Callable[[int], str] | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        callbacks: Sequence[TrainerCallback] = (),
    ) -> None:
        self.config, self.phases = config, phases
        self.checkpoint_root = folder / "checkpoints"
        self.metrics = MetricsLog(folder / "metrics.jsonl")
        self.clock = PhaseClock()
        self.finite = FiniteGuard(config.training.max_bad_steps)
        self.signals = SignalGuard()
        self.inputs: dict[str, str] | None = None  # fingerprints of what is trained from; taken in `train` if not given
        self.say: Callable[[str], None] = print if processes.is_main() else lambda line: None
        processes.start()
        self.autocast_dtype = processes.on_main(lambda: autocast_dtype(config.training.precision))
        refuse_weights(model)
        super().__init__(
            model=model,
            args=training_arguments(config),
            train_dataset=train_dataset,
            processing_class=tokenizer,
            data_collator=collate,
            callbacks=list(callbacks),
        )
        self.model_accepts_loss_kwargs = True  # `compute_loss` takes the tokens of a step
        self.add_callback(PhaseCallback(self))
        self._counter = ClockCallback(self.clock, phase_of or phases.of)
        self.add_callback(self._counter)
        self._bind(model)

    def _bind(self, model: PeftModel) -> None:
        """Makes a model ready to be trained."""
        if self.processing_class is not None:
            # Trainer does so when it trains; a model that has nothing left to train is exported with the same config.
            align_special_tokens(model, self.processing_class)
        use_training_attention(model)
        if self.config.training.gradient_checkpointing:
            enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
            enable()

    def _resume_point(self, resume: bool) -> Path | None:
        """The checkpoint that training goes on from, None for a start from step 0; says what is not as expected.

        Raises `InputError` when there are checkpoints and none is intact.
        """
        if self.inputs is None:
            self.inputs = fingerprints(self.model, self.processing_class, **self._samples())
        path = processes.on_main(lambda: resume_point(self.checkpoint_root, self.say)) if resume else None
        if path is None:
            self.metrics.rewind(0)
        return path

    def _samples(self) -> dict[str, Dataset]:
        """The data sets that training reads, by split."""
        return {"train": self.train_dataset}

    def _segment(self, path: Path | None) -> None:
        """Trainer's loop, from a checkpoint if there is one, until it ends."""
        super().train(resume_from_checkpoint=str(path) if path else None)
        self.check_steps()

    def _end_on_signal(self) -> None:
        """Raises `Interrupted` if one of the processes got a signal; the checkpoint is written by then."""
        self.signals.received = processes.largest(self.signals.received or 0) or None
        if self.signals.received is not None:
            newest = processes.on_main(lambda: checkpoints.newest(self.checkpoint_root))
            raise Interrupted(self.signals.received, f"continue with --resume (checkpoint {newest})")

    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        """One batch; returns its share of the step's mean loss per token, without regularizer, scalar float32.

        Trainer logs the sum over the batches of a step, its mean over processes and over the steps since the last log.
        """
        super().training_step(model, inputs, num_items_in_batch)
        return self._batch_loss

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        loss = causal_lm_loss(model, inputs, num_items_in_batch)
        if num_items_in_batch is not None:
            loss = loss * self.accelerator.num_processes  # the count is that of all processes, the gradients' mean too
        self._batch_loss = loss.detach()
        loss = self.regularized(loss)
        return (loss, {"loss": loss}) if return_outputs else loss

    def regularized(self, loss: Tensor) -> Tensor:
        """The loss of a batch with what a subclass adds to it."""
        return loss

    def compute_loss_context_manager(self) -> Any:
        enabled = self.autocast_dtype is not None
        return torch.autocast(self.args.device.type, dtype=self.autocast_dtype, enabled=enabled)

    def _get_train_sampler(self, train_dataset: Dataset | None = None) -> RunOrder:
        size = self.args.train_batch_size
        total = self.phases.total * size * self.args.gradient_accumulation_steps * self.args.world_size
        return run_order(self.train_dataset, size, total, self.config.seed)

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        if self.optimizer is None:
            named = {n: p for n, p in self.model.named_parameters() if p.requires_grad}
            self._trained = list(named)
            # Fused: it reads nothing back to the host, and can be told to skip a step by a tensor.
            self.adamw = torch.optim.AdamW(named.values(), lr=self.args.learning_rate, weight_decay=0.0, fused=True)
            self.optimizer = self.adamw
        return self.optimizer

    def trained_beside(self) -> list[nn.Parameter]:
        """Parameters that a subclass steps with an optimizer of its own, after that of the adapter."""
        return []

    def check_steps(self) -> None:
        """Raises `NotReached` for too many non-finite steps: before each checkpoint, and at the end of each phase."""
        done, cut = self.state.global_step, self.phases.cut_step
        if done in (cut, self.phases.total):
            self.finite.finish(done if done <= cut else done - cut)
        self.finite.report()

    def before_optimizer_step(self) -> None:
        """Called before each optimizer step, after clipping; does nothing unless a subclass has something to do."""

    def after_optimizer_step(self, step: int) -> None:
        """Called after the optimizer step `step`; does nothing unless a subclass has something to do."""

    # Checkpoints, in a format of our own

    def _save_checkpoint(self, model: nn.Module, trial: Any = None) -> None:
        self.check_steps()
        self._write(self._checkpoint())

    def _write(self, state: Checkpoint) -> Path:
        keep = self.config.training.keep_checkpoints
        return processes.on_main(lambda: checkpoints.save(self.checkpoint_root, state, keep=keep))

    def _checkpoint(self) -> Checkpoint:
        tensors = {f"model.{n}": p for n, p in self.model.named_parameters() if p.requires_grad}
        tensors |= prefixed("lora_optimizer", checkpoints.optimizer_tensors(self.optimizer, self._trained))
        tensors["rng.cpu"] = torch.get_rng_state()
        if self.args.device.type == "cuda":
            tensors["rng.cuda"] = torch.cuda.get_rng_state(self.args.device)
        meta = {
            "config": self.config.model_dump(mode="json"),
            "clock": self.clock.state(),
            "finite": self.finite.state(),
            "processes": processes.count(),
            "precision": "float32" if self.autocast_dtype is None else "bfloat16",
            "scheduler": self.lr_scheduler.state_dict(),
            "inputs": self.inputs,
        }
        return Checkpoint(self.state.global_step, tensors, meta, checkpoints.trainer_state_json(self.state))

    def _restore(self, state: Checkpoint) -> None:
        """Brings what is no tensor of the loop to the checkpoint. Raises `InputError` under other config or inputs."""
        self.config.refuse_change_of(state.meta["config"])
        if state.meta["processes"] != processes.count():
            raise InputError(
                f"the run has {state.meta['processes']} processes and is resumed in {processes.count()}, which would "
                "read other samples per step: resume it in as many as before"
            )
        refuse_other_inputs(state.meta.get("inputs") or {}, self.inputs)
        self.clock.load(state.meta["clock"])
        self.finite.restore(state.meta["finite"])
        self.autocast_dtype = autocast_dtype(state.meta["precision"])  # a new probe might answer otherwise
        damaged = self.metrics.rewind(state.step)
        if damaged:
            self.say(f"{self.metrics.path}: {damaged} damaged line(s) left out")

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
