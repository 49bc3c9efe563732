"""`ATPTrainer`: the one-stage job on top of `transformers.Trainer`.

Read it top to bottom: `train` runs search and settle, cuts, and tunes. `LoraTrainer` does the LoRA steps; its hooks
are where the decision step, the masks, the regularizer and the prox come in. The cut is a checkpoint rewritten for the
smaller model, so a resumed run and an unbroken one take the same path.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

from accelerate import DistributedType
from accelerate.utils import broadcast
from peft import PeftModel
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import TrainerCallback, set_seed

from atp import processes
from atp.checks import check_reachable
from atp.config import ATPConfig
from atp.data import collate
from atp.decide.maker import DecisionMaker, frozen
from atp.decide.saliency import fisher_saliency, saliency_logits
from atp.errors import InputError
from atp.evaluation.inference import inference
from atp.export.card import model_card
from atp.export.hf import export_model, keep_adapter, save_decisions
from atp.families import is_cut
from atp.loading import load_data, load_model, load_tokenizer
from atp.lora.controller import MaskController
from atp.lora.l0 import L0Gates
from atp.lora.lasso import LoraGroups
from atp.lora.layer import add_lora
from atp.removal import cut_model, cut_state_dict
from atp.removal.certify import certificate_tokens
from atp.removal.refit import refit
from atp.spaces.space import MaskSpace
from atp.training import checkpoint as checkpoints
from atp.training.certificate import at_cut, at_freeze, masked_logits, write_certificate
from atp.training.checkpoint import Checkpoint
from atp.training.decision_state import decision_tensors, prefixed, restore_decisions
from atp.training.fingerprints import fingerprints
from atp.training.lora_trainer import LoraTrainer
from atp.training.loss import causal_lm_loss
from atp.training.order import run_order
from atp.training.phases import Phases
from atp.training.profiling import scope

_UNSHARDED = (DistributedType.NO, DistributedType.MULTI_CPU, DistributedType.MULTI_GPU)


class ATPTrainer(LoraTrainer):
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
        callbacks: Sequence[TrainerCallback] = (),
    ) -> None:
        self.space = MaskSpace.from_config(model.config, config.decisions.space)
        self.params_before = sum(p.numel() for p in model.parameters())
        self.calibration_dataset = calibration_dataset
        self.certificate: dict[str, Any] = {}
        self.refitted: list[str] = []  # base weights, by their names in the decoder, that a refit changed
        self.decisions: DecisionMaker | None = None
        self.last: dict[str, Tensor | float] = {}
        self._decided = -1
        lora = config.lora
        wrapped = add_lora(model, self.space, r=lora.r, alpha=lora.alpha, dropout=lora.dropout, seed=config.seed)
        phases = Phases.from_config(config.training)
        super().__init__(
            config, wrapped, train_dataset, Path(config.output_dir), phases, tokenizer=tokenizer, callbacks=callbacks
        )
        if config.decisions.refit_windows and not self._weights_are_whole():
            raise InputError("decisions.refit_windows needs whole weights in every process: set it to 0 to shard them")

    @classmethod
    def from_config(cls, config: ATPConfig, callbacks: Sequence[TrainerCallback] = ()) -> ATPTrainer:
        """Loads tokenizer, data and model that the config names. Raises `InputError` for what is wrong with them."""
        tokenizer = load_tokenizer(config.model)
        data = load_data(config, tokenizer)
        model = load_model(config.model, config.decisions.space)
        check_reachable(config, model.config)
        inputs = fingerprints(model, tokenizer, train=data.train, calibration=data.calibration)
        trainer = cls(config, model, data.train, data.calibration, tokenizer=tokenizer, callbacks=callbacks)
        trainer.inputs = inputs  # those of the model as it was loaded
        return trainer

    # The run, phase by phase

    def train(self, resume: bool = False, **_: Any) -> None:
        """Runs what is left of search -> settle -> cut -> tune. resume continues the newest complete checkpoint.

        Raises `Interrupted` after a signal (with a checkpoint written) and `NotReached` when losses stay non-finite or
        the cut changes the model.
        """
        path = self._resume_point(resume)
        if resume and path is None:
            raise InputError(f"nothing to resume: {self.checkpoint_root} holds no complete checkpoint")
        self._restore(checkpoints.load(path)) if path else self._start()
        step = checkpoints.load(path).step if path else 0
        with self.signals:
            if step < self.phases.cut_step:
                self._segment(path)
                # A signal in the last step before the cut is answered after it: there is no checkpoint between them.
                if self.state.global_step < self.phases.cut_step:
                    self._end_on_signal()
                path, step = self._cut(), self.phases.cut_step
                self._end_on_signal()
            if step < self.phases.total:
                self._segment(path)
            else:
                self._load_from_checkpoint(str(path))
        self._end_on_signal()

    def export(self, folder: str | Path) -> dict[str, Any]:
        """Writes model/, the decisions and certificate.json under `folder`; returns the certificate.

        With `export.keep_adapter` also base/ and adapter/. The main process writes; the others wait for it. Raises
        `NotReached` for a merged weight that is not finite.
        """
        self.certificate = processes.on_main(lambda: self._export(Path(folder)))
        return self.certificate

    def _export(self, folder: Path) -> dict[str, Any]:
        folder.mkdir(parents=True, exist_ok=True)
        save_decisions(folder, self.space, self.decisions.mask)
        before, after = self.params_before, sum(p.numel() for n, p in self.model.named_parameters() if "lora_" not in n)
        card = model_card(self.config, before, after)
        tokens = self._certificate_tokens()
        self.certificate |= export_model(self.model, folder, self.processing_class, tokens, card)
        if self.config.export.keep_adapter:
            keep_adapter(self.model, folder, self.processing_class, self.config)
        write_certificate(folder / "certificate.json", self.certificate, tokens)
        return self.certificate

    def _start(self) -> None:
        set_seed(self.config.seed)  # whatever this process drew before must not matter
        started = time.perf_counter()
        prior = None
        if self.config.decisions.init == "saliency":
            count = min(self.config.decisions.saliency_windows, len(self.calibration_dataset))
            batches = (self._calibration_batch(i, 1) for i in range(count))
            with frozen(self.model):
                saliency = fisher_saliency(self.space, batches, self._calibration_loss)
            self.controller.clear()
            saliency = processes.from_main(saliency, "saliency")
            prior = saliency_logits(saliency, self.space, self.config.decisions.saliency_scale)
        self._make_decisions(prior)
        self.clock.add("saliency", time.perf_counter() - started)

    def _make_decisions(self, prior: Tensor | None) -> None:
        config = self.config
        self.decisions = DecisionMaker(
            self.space, config.decisions, search_steps=self.phases.search, prior=prior, seed=config.seed,
            max_bad_steps=config.training.max_bad_steps,
        )  # fmt: skip

    def _cut(self) -> Path:
        """Cuts the settled model, measures that nothing changed, and writes the checkpoint that tune starts from."""
        started = time.perf_counter()
        mask = self.decisions.mask
        tokens = self._certificate_tokens()
        left = self.groups.largest_removed_norm(mask)
        reference = masked_logits(self.model, self.controller, mask, tokens)
        state = self._checkpoint()
        self._become_cut()
        self.certificate |= at_cut(reference, self.model, tokens, left)
        for prefix in ("model", "lora_optimizer", "refit"):
            part = cut_state_dict(state.part(prefix), self.space, mask)
            state.tensors.update({f"{prefix}.{name}": tensor for name, tensor in part.items()})
        self.clock.add("cut", time.perf_counter() - started)
        state.meta.update(certificate=self.certificate, clock=self.clock.state())
        return self._write(state)

    def _become_cut(self) -> None:
        """Swaps in the smaller model; optimizer and scheduler are made anew around its parameters."""
        self.model = self.model_wrapped = cut_model(self.model, self.space, self.decisions.mask)
        self.optimizer = self.adamw = self.lr_scheduler = None
        # Trainer collects garbage before it tells its handler of the new model: the old one must be garbage by then.
        handler = self.callback_handler
        handler.model, handler.optimizer, handler.lr_scheduler = self.model, None, None
        self._bind(self.model)

    def _bind(self, model: PeftModel) -> None:
        """Points mask controller, lasso table and gates at the model's layers; none is used after the cut."""
        super()._bind(model)
        cut = self.decisions is not None and self.decisions.frozen and is_cut(model.config)
        self.controller = None if cut else MaskController(model, self.space)
        self.groups = None if cut else LoraGroups(model, self.space)
        gated = self.config.training.regularizer == "l0" and not cut
        self.gates = L0Gates(model, self.space, seed=self.config.seed + 2) if gated else None

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
            with self._gated(sample=True):
                return super().training_step(model, inputs, num_items_in_batch)
        finally:
            self.controller.clear()

    def _lasso_weight(self) -> float:
        """The weight of the group lasso in this step, 0 where it has none."""
        training, phase = self.config.training, self.phases.of(self.state.global_step)
        betas = {"search": training.beta, "settle": training.settle_beta} if self.gates is None else {}
        return betas.get(phase, 0.0)

    def _adds_lasso_to_gradients(self) -> bool:
        """Whether the lasso's gradient is added to `.grad` after the backward pass, which spares autograd's work on it.

        Every process of a data-parallel run then adds the same to gradients that are reduced already. Where gradients
        are sharded or scaled the lasso is a part of the loss instead.
        """
        return self.accelerator.scaler is None and self._weights_are_whole()

    def _weights_are_whole(self) -> bool:
        return self.accelerator.distributed_type in _UNSHARDED

    def _gated(self, *, sample: bool) -> AbstractContextManager[None]:
        """The gates of regularizer `l0` on removed LoRA groups, for the duration of a with block."""
        return nullcontext() if self.gates is None else self.gates.applied(self.decisions.mask, sample=sample)

    def _decide(self, step: int, phase: str) -> None:
        """Once a LoRA step: a decision step and a new mask while searching, the freeze at the start of settle."""
        self._decided = step
        if phase == "settle":
            if not self.decisions.frozen:
                self._gap_at_freeze(self.decisions.freeze())
                self._refit()
            return
        if step % self.config.decisions.every == 0:
            batch = self._calibration_batch(step // self.config.decisions.every, self.config.decisions.batch_size)
            try:
                with frozen(self.model), scope("masks"):
                    outcome = self.decisions.update(step, lambda mask: self._calibration_loss(batch, mask))
                    self.decisions.refresh(step)
            finally:
                self.controller.clear()
            self.last.update(decision_loss=outcome.loss, budget_loss=outcome.budget_loss)

    def trained_beside(self) -> list[nn.Parameter]:
        return [] if self.gates is None else [self.gates.log_alpha]

    def check_steps(self) -> None:
        super().check_steps()
        self.decisions.finite.report()

    def _gap_at_freeze(self, mask: Tensor) -> None:
        tokens = self._certificate_tokens()
        with self._gated(sample=False):
            reference = masked_logits(self.model, self.controller, mask, tokens)
        self.certificate |= at_freeze(reference, self.model, self.controller, mask, tokens)

    def _refit(self) -> None:
        """Fits what reads removed inputs to the inputs that stay, once no decision moves any more."""
        count = min(self.config.decisions.refit_windows, len(self.calibration_dataset))
        if not count:
            return
        batches = (self._calibration_batch(i, 1) for i in range(count))
        with self._counter.counted_as("refit"), inference(self.model, self.autocast_dtype):
            fitted = refit(self._decoder, self.controller, self.space, self.decisions.mask, batches)
        broadcast(list(fitted.values()))  # processes must not differ, not even by rounding
        self.refitted = list(fitted)
        self.controller.forget()

    @property
    def _decoder(self) -> nn.Module:
        return self.model.get_base_model().get_decoder()

    def _calibration_loss(self, batch: dict[str, Tensor], mask: Tensor) -> Tensor:
        """CE under a soft mask. The mask stays on the layers until the backward pass is over: checkpointing reruns."""
        self.controller.set(mask, "soft")
        with self.compute_loss_context_manager():
            return causal_lm_loss(self.model, batch)

    def regularized(self, loss: Tensor) -> Tensor:
        weight = self._lasso_weight()
        if not weight or not self.model.training or self._adds_lasso_to_gradients():
            return loss
        with scope("loss"):
            lasso = self.groups.lasso(self.decisions.mask.to(loss.device))
        self.last["lasso"] = lasso.detach()
        return loss + weight * lasso / self.args.gradient_accumulation_steps

    def before_optimizer_step(self) -> None:
        """Adds the gradient of the lasso to clipped gradients.

        It is beta for each removed group: a norm of 81 for SmolLM2's 74,000 and beta 0.3, beside a clip of 1. Clipped
        together, little was left of the loss's gradient until the cut, and AdamW's second moments were too small after.
        """
        weight = self._lasso_weight()
        if weight and self._adds_lasso_to_gradients():
            with scope("loss"):
                self.last["lasso"] = self.groups.lasso_grad_(self.decisions.mask.to(self.args.device), weight)

    def after_optimizer_step(self, step: int) -> None:
        """A step of the gates, and in settle one of the removed LoRA groups towards zero."""
        phase, training = self.phases.of(step), self.config.training
        if phase == "tune":
            return
        if self.gates is not None:
            beta = training.settle_beta if phase == "settle" else training.beta
            self.last["l0"] = self.gates.step(self.decisions.mask, beta, skip=self.adamw.found_inf)
        if phase == "settle":
            self._settle(step)

    def _settle(self, step: int) -> None:
        """Shrinks removed LoRA groups after the optimizer step `step`, so that the last settle step zeroes them."""
        left = self.phases.cut_step - step
        mask = self.decisions.mask
        if self.gates is not None:
            self.gates.fold_closed_(mask)
        largest = self.groups.largest_removed_norm(mask)
        # The last threshold is doubled: rounding in the norm must not leave a remainder.
        self.groups.prox_(mask.to(self.args.device), largest / left if left > 1 else 2 * largest)

    # Data, optimizer, records

    def _samples(self) -> dict[str, Dataset]:
        return {**super()._samples(), "calibration": self.calibration_dataset}

    def _calibration_batch(self, index: int, size: int) -> dict[str, Tensor]:
        order = run_order(self.calibration_dataset, size, 0, self.config.seed + 1)
        with scope("data"):
            return self._prepare_inputs(collate([self.calibration_dataset[i] for i in order.at(index * size, size)]))

    def _certificate_tokens(self) -> Tensor:
        return certificate_tokens(self.calibration_dataset).to(self.args.device)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:
            self.check_steps()
            step = self.state.global_step
            phase = self.phases.of(step - 1)
            record = {"loss": logs["loss"]} | {name: float(value) for name, value in self.last.items()}
            if phase != "tune":
                record |= self.decisions.record(step)
            record |= {"lr": logs["learning_rate"]} | self.clock.record(phase)
            seconds = sum(self.clock.seconds.values())
            kept = {} if phase == "tune" else {"kept_by_layer": self.space.kept_by_layer(self.decisions.mask)}
            self.metrics.write({"step": step, "phase": phase, **record, **kept, "seconds": seconds})
            logs |= record
            self.last.clear()
        super().log(logs, start_time)

    # Checkpoints

    def _checkpoint(self) -> Checkpoint:
        state = super()._checkpoint()
        state.tensors.update(decision_tensors(self.decisions))
        weights = dict(self._decoder.named_parameters())
        state.tensors.update(prefixed("refit", {name: weights[name] for name in self.refitted}))
        if self.gates is not None:
            state.tensors.update(prefixed("gates", self.gates.state_dict()))
        state.meta.update(
            frozen=self.decisions.frozen, certificate=self.certificate, finite_decisions=self.decisions.finite.state()
        )
        return state

    def _restore(self, state: Checkpoint) -> None:
        """Brings generator, decisions, certificate and records to the checkpoint; cuts the model when it was cut."""
        super()._restore(state)
        self._make_decisions(state.tensors["generator.prior"])
        restore_decisions(self.decisions, state)
        self.certificate = state.meta["certificate"]
        if "masked_vs_cut" in self.certificate:
            self._become_cut()
        refitted = state.part("refit")
        self._decoder.load_state_dict(refitted, strict=False)
        self.refitted = list(refitted)
        if self.gates is not None:
            self.gates.load_state_dict(state.part("gates"))
