"""`ATPTrainer`: the one-stage job on top of `transformers.Trainer`.

Read it top to bottom: `train` runs search and settle, cuts, and tunes. Trainer's loop does the LoRA steps; its hooks
are where the decision step, the masks, the regularizer and the prox come in. The cut is a checkpoint rewritten for the
smaller model, so a resumed run and an unbroken one take the same path.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import Trainer, TrainerCallback, set_seed

from atp.config import ATPConfig
from atp.data import collate
from atp.errors import InputError, Interrupted
from atp.export.card import model_card
from atp.export.hf import export_model, save_decisions, write_json
from atp.loading import check_length, load_data, load_model, load_tokenizer
from atp.lora.controller import MaskController
from atp.lora.lasso import LoraGroups
from atp.lora.layer import add_lora
from atp.masks.space import MaskSpace
from atp.models.attention import use_training_attention
from atp.removal import compare, cut_model, cut_state_dict, reference_logits
from atp.training import checkpoint as checkpoints
from atp.training.arguments import training_arguments
from atp.training.callbacks import ClockCallback, PhaseCallback
from atp.training.checkpoint import Checkpoint
from atp.training.decisions import DecisionMaker
from atp.training.guards import FiniteGuard, SignalGuard
from atp.training.loss import causal_lm_loss
from atp.training.metrics import MetricsLog, PhaseClock
from atp.training.order import RunOrder, run_order
from atp.training.phases import Phases
from atp.training.precision import autocast_dtype
from atp.training.profiling import scope
from atp.training.saliency import fisher_saliency, saliency_logits

_CERTIFICATE_WINDOWS = 4


class ATPTrainer(Trainer):
    """Tunes a causal LM with LoRA and removes structures in the same run.

    model: a Llama-like causal LM (stock transformers). train_dataset and calibration_dataset yield dictionaries with
    `input_ids` and `labels` int64 [length], as the datasets of `atp.data` do. Raises `InputError` for a model that the
    mask space does not cover.
    """

    def __init__(
        self,
        config: ATPConfig,
        model: nn.Module,
        train_dataset: Dataset,
        calibration_dataset: Dataset,
        *,
        tokenizer: Any = None,
        callbacks: list[TrainerCallback] | None = None,
    ) -> None:
        self.config = config
        self.space = MaskSpace.from_config(model.config, config.decisions.space)
        self.phases = Phases.from_config(config.training)
        self.params_before = sum(p.numel() for p in model.parameters())
        self.calibration_dataset = calibration_dataset
        self.metrics = MetricsLog(Path(config.output_dir) / "metrics.jsonl")
        self.clock = PhaseClock()
        self.finite = FiniteGuard(config.training.max_bad_steps)
        self.signals = SignalGuard()
        self.autocast_dtype = autocast_dtype(config.training.precision)
        self.certificate: dict[str, float] = {}
        self.decisions: DecisionMaker | None = None
        self.last: dict[str, Tensor | float] = {}
        self._decided = -1
        lora = config.lora
        wrapped = add_lora(model, self.space, r=lora.r, alpha=lora.alpha, dropout=lora.dropout, seed=config.seed)
        super().__init__(
            model=wrapped,
            args=training_arguments(config),
            train_dataset=train_dataset,
            processing_class=tokenizer,
            data_collator=collate,
            callbacks=callbacks,
        )
        self.add_callback(PhaseCallback(self))
        self._counter = ClockCallback(self.clock, self.phases.of)
        self.add_callback(self._counter)
        self._bind(wrapped)

    @classmethod
    def from_config(cls, config: ATPConfig, callbacks: list[TrainerCallback] | None = None) -> ATPTrainer:
        """Loads tokenizer, data and model that the config names. Raises `InputError` for what is wrong with them."""
        tokenizer = load_tokenizer(config.model)
        data = load_data(config, tokenizer)
        model = load_model(config.model, config.decisions.space)
        check_length(model, config.data.length)
        return cls(config, model, data.train, data.calibration, tokenizer=tokenizer, callbacks=callbacks)

    # The run, phase by phase

    def train(self, resume: bool = False, **_: Any) -> None:
        """Runs what is left of search -> settle -> cut -> tune. resume continues the newest complete checkpoint.

        Raises `Interrupted` after a signal (with a checkpoint written) and `NotReached` when losses stay non-finite.
        """
        path = checkpoints.newest(self.checkpoint_root) if resume else None
        if resume and path is None:
            raise InputError(f"nothing to resume: {self.checkpoint_root} holds no complete checkpoint")
        self._restore(checkpoints.load(path)) if path else self._start()
        step = checkpoints.load(path).step if path else 0
        with self.signals:
            if step < self.phases.cut_step:
                self._segment(path)
                path = self._cut()
                step = self.phases.cut_step
            if step < self.phases.total:
                self._segment(path)

    def export(self, folder: str | Path) -> dict[str, float]:
        """Writes adapter/, model/, the decisions and certificate.json under `folder`; returns the certificate."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        save_decisions(folder, self.space, self.decisions.mask)
        before, after = self.params_before, sum(p.numel() for n, p in self.model.named_parameters() if "lora_" not in n)
        card = model_card(self.config, before, after)
        tokens = self._certificate_tokens()
        gap = export_model(self.model, folder, self.processing_class, tokens, card)
        self.certificate |= {"cut_vs_reloaded": gap.relative, "cut_vs_reloaded_absolute": gap.absolute}
        write_json(folder / "certificate.json", self.certificate | {"tokens": tokens.numel(), "dtype": "float32"})
        return self.certificate

    @property
    def checkpoint_root(self) -> Path:
        """Where checkpoints lie."""
        return Path(self.config.output_dir) / "checkpoints"

    def _start(self) -> None:
        set_seed(self.config.seed)  # whatever this process drew before must not matter
        started = time.perf_counter()
        prior = None
        if self.config.decisions.init == "saliency":
            count = min(self.config.decisions.saliency_windows, len(self.calibration_dataset))
            batches = (self._calibration_batch(i, 1) for i in range(count))
            saliency = fisher_saliency(self.space, batches, self._calibration_loss)
            self.controller.clear()
            prior = saliency_logits(saliency, self.space, self.config.decisions.saliency_scale)
        self._make_decisions(prior)
        self.clock.add("saliency", time.perf_counter() - started)

    def _make_decisions(self, prior: Tensor | None) -> None:
        config = self.config
        self.decisions = DecisionMaker(
            self.space, config.decisions, search_steps=self.phases.search, prior=prior, seed=config.seed
        )

    def _segment(self, path: Path | None) -> None:
        """Trainer's loop up to the cut or to the end."""
        super().train(resume_from_checkpoint=str(path) if path else None)
        if self.signals.received is not None:
            raise Interrupted(self.signals.received, str(checkpoints.newest(self.checkpoint_root)))

    def _cut(self) -> Path:
        """Cuts the settled model, measures that nothing changed, and writes the checkpoint that tune starts from."""
        started = time.perf_counter()
        mask = self.decisions.mask
        tokens = self._certificate_tokens()
        self.certificate["removed_lora_norm"] = self.groups.largest_removed_norm(mask)
        with self.controller.masks(mask, "hard"):
            reference = reference_logits(self.model, tokens)
        state = self._checkpoint()
        self._become_cut()
        gap = compare(reference, self.model, tokens)
        self.certificate |= {"masked_vs_cut": gap.relative, "masked_vs_cut_absolute": gap.absolute}
        for prefix in ("model", "lora_optimizer"):
            part = cut_state_dict(state.part(prefix), self.space, mask)
            state.tensors.update({f"{prefix}.{name}": tensor for name, tensor in part.items()})
        self.clock.add("cut", time.perf_counter() - started)
        state.meta.update(certificate=self.certificate, clock=self.clock.state())
        return checkpoints.save(self.checkpoint_root, state, keep=self.config.training.keep_checkpoints)

    def _become_cut(self) -> None:
        """Swaps in the smaller model; optimizer and scheduler are made anew around its parameters."""
        self.model = self.model_wrapped = cut_model(self.model, self.space, self.decisions.mask)
        self.optimizer = self.adamw = self.lr_scheduler = None
        # Trainer collects garbage before it tells its handler of the new model: the old one must be garbage by then.
        handler = self.callback_handler
        handler.model, handler.optimizer, handler.lr_scheduler = self.model, None, None
        self._bind(self.model)

    def _bind(self, model: PeftModel) -> None:
        """Points the mask controller and the lasso table at the model's layers; neither is used after the cut."""
        use_training_attention(model)
        cut = self.decisions is not None and self.decisions.frozen and model.config.model_type == "atp_llama"
        if self.config.training.gradient_checkpointing:
            enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
            enable()
        self.controller = None if cut else MaskController(model, self.space)
        self.groups = None if cut else LoraGroups(model, self.space)

    # One step

    def training_step(self, model: nn.Module, inputs: dict[str, Tensor], num_items_in_batch: Any = None) -> Tensor:
        step = self.state.global_step
        phase = self.phases.of(step)
        self._counter.count(inputs["tokens"] * self.args.world_size)
        if phase == "tune":
            return super().training_step(model, inputs, num_items_in_batch)
        if self._decided != step:
            self._decide(step, phase)
        with scope("masks"):
            self.controller.set(self.decisions.mask, "hard")
        try:
            return super().training_step(model, inputs, num_items_in_batch)
        finally:
            self.controller.clear()

    def _decide(self, step: int, phase: str) -> None:
        """Once a LoRA step: a decision step and a new mask while searching, the freeze at the start of settle."""
        self._decided = step
        if phase == "settle":
            if not self.decisions.frozen:
                self.decisions.freeze()
            return
        if step % self.config.decisions.every == 0:
            batch = self._calibration_batch(step // self.config.decisions.every, self.config.decisions.batch_size)
            frozen = [p for p in self.model.parameters() if p.requires_grad]
            for parameter in frozen:
                parameter.requires_grad_(False)
            try:
                with scope("masks"):
                    outcome = self.decisions.update(step, lambda mask: self._calibration_loss(batch, mask))
                    self.decisions.refresh(step)
            finally:
                self.controller.clear()
                for parameter in frozen:
                    parameter.requires_grad_(True)
            self.last.update(decision_loss=outcome.loss, budget_loss=outcome.budget_loss)

    def _calibration_loss(self, batch: dict[str, Tensor], mask: Tensor) -> Tensor:
        """CE under a soft mask. The mask stays on the layers until the backward pass is over: checkpointing reruns."""
        self.controller.set(mask, "soft")
        with self.compute_loss_context_manager():
            return causal_lm_loss(self.model, batch)

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        loss = causal_lm_loss(model, inputs, num_items_in_batch)
        if num_items_in_batch is not None:
            loss = loss * self.accelerator.num_processes  # the count is that of all processes, the gradients' mean too
        self.last["loss"] = loss.detach()
        phase = self.phases.of(self.state.global_step)
        training = self.config.training
        beta = {"search": training.beta, "settle": training.settle_beta}.get(phase, 0.0)
        if beta and model.training:
            with scope("loss"):
                lasso = self.groups.lasso(self.decisions.mask.to(loss.device))
            self.last["lasso"] = lasso.detach()
            loss = loss + beta * lasso / self.args.gradient_accumulation_steps
        return (loss, {"loss": loss}) if return_outputs else loss

    def compute_loss_context_manager(self) -> Any:
        enabled = self.autocast_dtype is not None
        return torch.autocast(self.args.device.type, dtype=self.autocast_dtype, enabled=enabled)

    def settle_step(self, step: int) -> None:
        """Shrinks removed LoRA groups after the optimizer step `step`, so that the last settle step zeroes them."""
        left = self.phases.cut_step - step
        mask = self.decisions.mask
        largest = self.groups.largest_removed_norm(mask)
        # The last threshold is doubled: rounding in the norm must not leave a remainder.
        self.groups.prox_(mask.to(self.args.device), largest / left if left > 1 else 2 * largest)

    # Data, optimizer, records

    def _calibration_batch(self, index: int, size: int) -> dict[str, Tensor]:
        order = run_order(self.calibration_dataset, size, 0, self.config.seed + 1)
        with scope("data"):
            return self._prepare_inputs(collate([self.calibration_dataset[i] for i in order.at(index * size, size)]))

    def _certificate_tokens(self) -> Tensor:
        rows = range(min(_CERTIFICATE_WINDOWS, len(self.calibration_dataset)))
        return collate([self.calibration_dataset[i] for i in rows])["input_ids"].to(self.args.device)

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

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:
            self.finite.report()
            step = self.state.global_step
            phase = self.phases.of(step - 1)
            record = {name: float(value) for name, value in self.last.items()}
            if phase != "tune":
                record |= {
                    "keep": self.decisions.budget.share(self.decisions.mask),
                    "target_keep": self.decisions.target_at(step),
                    "changed": float(self.decisions.changed),
                }
            record |= {
                "lr": logs["learning_rate"],
                "tokens_per_second": self.clock.rate(phase),
                "phase_tokens": self.clock.tokens[phase],
                "phase_seconds": self.clock.seconds[phase],
            }
            self.metrics.write({"step": step, "phase": phase, **record, "seconds": sum(self.clock.seconds.values())})
            logs |= record
            self.last.clear()
        super().log(logs, start_time)

    # Checkpoints

    def _meta(self) -> dict[str, Any]:
        return {
            "config": self.config.model_dump(mode="json"),
            "frozen": self.decisions.frozen,
            "certificate": self.certificate,
            "clock": self.clock.state(),
            "skipped": self.finite.skipped,
            "precision": "float32" if self.autocast_dtype is None else "bfloat16",
            "scheduler": self.lr_scheduler.state_dict(),
        }

    def _checkpoint(self) -> Checkpoint:
        tensors = {f"model.{n}": p for n, p in self.model.named_parameters() if p.requires_grad}
        tensors |= {f"generator.{n}": t for n, t in self.decisions.generator.state_dict().items()}
        tensors |= _prefixed("lora_optimizer", checkpoints.optimizer_tensors(self.optimizer, self._trained))
        names = [n for n, _ in self.decisions.generator.named_parameters()]
        tensors |= _prefixed("decision_optimizer", checkpoints.optimizer_tensors(self.decisions.optimizer, names))
        tensors |= {"mask": self.decisions.mask, "rng.decision": self.decisions.noise.get_state()}
        tensors["rng.cpu"] = torch.get_rng_state()
        if self.args.device.type == "cuda":
            tensors["rng.cuda"] = torch.cuda.get_rng_state(self.args.device)
        return Checkpoint(self.state.global_step, tensors, self._meta(), checkpoints.trainer_state_json(self.state))

    def _save_checkpoint(self, model: nn.Module, trial: Any = None) -> None:
        if self.args.should_save:
            checkpoints.save(self.checkpoint_root, self._checkpoint(), keep=self.config.training.keep_checkpoints)

    def _restore(self, state: Checkpoint) -> None:
        """Brings generator, decisions, certificate and records to the checkpoint; cuts the model when it was cut."""
        self.config.refuse_change_of(state.meta["config"])
        generator = state.part("generator")
        self._make_decisions(generator["prior"])
        self.decisions.generator.load_state_dict(generator)
        names = [n for n, _ in self.decisions.generator.named_parameters()]
        checkpoints.load_optimizer_tensors(self.decisions.optimizer, names, state.part("decision_optimizer"))
        self.decisions.noise.set_state(state.tensors["rng.decision"])
        self.decisions.mask = state.tensors["mask"].bool()
        self.decisions.frozen = state.meta["frozen"]
        self.certificate = state.meta["certificate"]
        self.clock.load(state.meta["clock"])
        self.finite.restore(state.meta["skipped"])
        self.autocast_dtype = autocast_dtype(state.meta["precision"])  # a new probe might answer otherwise
        self.metrics.rewind(state.step)
        if "masked_vs_cut" in self.certificate:
            self._become_cut()

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


def _prefixed(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {f"{prefix}.{name}": tensor for name, tensor in tensors.items()}
