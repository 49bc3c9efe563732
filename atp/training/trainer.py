"""`ATPTrainer`: the one-stage job. `train` runs open, search, settle, cut and tune, in this order, in one loop.

The cut is a checkpoint rewritten for the smaller model, so a resumed run and an unbroken one take the same path.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from typing import Any

from peft import PeftModel
from torch import Tensor
from torch.utils.data import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase, set_seed

from atp.config import ATPConfig, LoraVariant
from atp.decide.decisions import Decisions
from atp.export.card import model_card
from atp.export.hf import export_model, keep_adapter, save_decisions
from atp.ground import heap
from atp.ground.errors import InputError
from atp.inputs.checks import check_reachable
from atp.inputs.folders import VOCABULARY
from atp.inputs.loading import load_data, load_model, load_tokenizer
from atp.inputs.resolve import resolve
from atp.lora.layer import add_lora
from atp.models.base import FORMS
from atp.models.fused import split_projections
from atp.models.stock import stock_config
from atp.processes import processes
from atp.removal import base_of, cut_state_dict, merge_adapter
from atp.removal.masters import whole_model
from atp.sharding.shards import is_sharded, sharded_copy
from atp.spaces.space import MaskSpace
from atp.training import checkpoint as checkpoints
from atp.training.callbacks import Callback, Record
from atp.training.certificate import write_certificate
from atp.training.checkpoint import Checkpoint
from atp.training.loop import Loop
from atp.training.loss import causal_of
from atp.training.pruning import Pruning
from atp.training.resume import begun, fingerprints, of_words
from atp.training.schedule import Phases
from atp.training.steps import open_step, search_step, settle_step, tune_step
from atp.vocabulary.vocabulary import written


class ATPTrainer(Loop):
    """Tunes a causal LM with LoRA and removes structures in the same run; `atp.Run` also scores, and writes the report.

    model: a Llama-like causal LM (stock transformers). train_dataset and calibration_dataset yield dictionaries with
    `input_ids` and `labels` int64 [length], as the datasets of `atp.data` do; so does validation, which
    `evaluation.every` needs. Raises `InputError` for a model that the
    mask space does not cover.
    """

    def __init__(
        self,
        config: ATPConfig,
        model: PreTrainedModel,
        train_dataset: Dataset,
        calibration_dataset: Dataset,
        *,
        validation: Dataset | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        callbacks: Sequence[Callback] = (),
    ) -> None:
        processes.start(config.training.sharding, config.model_dump())
        model = split_projections(model)
        if processes.sharded() and not is_sharded(model):
            model = sharded_copy(model, processes.device())
        space = MaskSpace.from_config(model.config, config.decisions.space)
        params_before = sum(p.numel() for p in model.parameters())
        wrapped = add_lora(model, space, **config.lora.model_dump(), seed=config.seed)
        phases = Phases.from_config(config.training)
        super().__init__(
            config, wrapped, train_dataset, Path(config.output_dir), phases, validation=validation,
            tokenizer=tokenizer, callbacks=callbacks,
        )  # fmt: skip
        self.params_before = params_before
        self._merged: dict[str, Tensor] = {}  # DoRA's adapter of the open phase, once it is merged
        self.pruning = Pruning(
            self.adapted, space, calibration_dataset, self.config.decisions, self.config.training, seed=config.seed,
            autocast=self.autocast_dtype,
        )  # fmt: skip
        self.pruning.offload = self.offload

    @classmethod
    def from_config(cls, config: ATPConfig, callbacks: Sequence[Callback] = ()) -> ATPTrainer:
        """Loads tokenizer, data and model that the config names. Raises `InputError` for what is wrong with them."""
        config = begun(config) or resolve(config)
        tokenizer = load_tokenizer(config.model)
        data = load_data(config, tokenizer, written(Path(config.output_dir) / VOCABULARY))
        model = load_model(config.model, config.decisions.space)
        check_reachable(config, model.config)
        inputs = fingerprints(model, tokenizer, **data.read_in_training)
        if data.vocabulary is not None:
            inputs["vocabulary"] = of_words(data.vocabulary.kept)
            data.vocabulary.trim(model)
        trainer = cls(
            config, model, data.train, data.calibration, validation=data.validation, tokenizer=data.tokenizer,
            callbacks=callbacks,
        )  # fmt: skip
        trainer.inputs = inputs  # those of the model as it was loaded
        return trainer

    @property
    def space(self) -> MaskSpace:
        """What a decision removes."""
        return self.pruning.space

    @property
    def decisions(self) -> Decisions:
        """The decisions and the mask they have come to."""
        return self.pruning.decisions

    @property
    def certificate(self) -> dict[str, Any]:
        """What freeze, cut and export were measured to change, as far as the run has come."""
        return self.pruning.certificate

    # The run, phase by phase

    def train(self, resume: bool = False) -> None:
        """Runs what is left of open -> search -> settle -> cut -> tune. resume: from the newest complete checkpoint.

        Raises `Interrupted` after a signal (with a checkpoint written) and `NotReached` when losses stay non-finite or
        the cut changes the model.
        """
        self._enter(resume)
        phases, pruning = self.phases, self.pruning
        with self.session():
            self._before_decisions()
            self.run("search", partial(search_step, self, pruning), until=phases.freeze_step)
            if not self.decisions.frozen:
                self._freeze()
            self.run("settle", partial(settle_step, self, pruning), until=phases.cut_step)
            if not pruning.is_cut:
                self._cut()
            self.run("tune", partial(tune_step, self), until=phases.total)
            self.take_best()

    def train_open(self, resume: bool = False) -> Path:
        """Runs what is left of all that no target changes: the open phase, and the saliency at its end.

        Returns the checkpoint that it writes there; `atp.training.resume.for_target` makes it that of a run with any
        target. Raises as `train` does.
        """
        self._enter(resume)
        with self.session():
            self._before_decisions()
            if self._batches is None and self.step < self.phases.cut_step:
                # Making them draws a random number, which a run that goes on from here does not draw again.
                self._batches = self.batches_from(self.step)
            self.check()
            path = self.write(self.checkpoint())
            self.end_on_signal()
        return path

    def _enter(self, resume: bool) -> None:
        path = self.resume_point(resume)
        if resume and path is None:
            raise InputError(f"nothing to resume: {self.checkpoint_root} holds no complete checkpoint")
        self._restore(checkpoints.load(path)) if path else self._start()

    def _before_decisions(self) -> None:
        self.run("open", partial(open_step, self, self.pruning), until=self.phases.open)
        if self._is_dora and not self._merged:
            with self.clock.timed("cut"):
                self._merge()
        if not self.pruning.scored:
            self._score()

    def _start(self) -> None:
        set_seed(self.config.seed)  # whatever this process drew before must not matter
        if self.config.decisions.source == "static":
            self._score()

    def _score(self) -> None:
        with self.clock.timed("saliency"):
            self.pruning.start()

    def _adapter_copy(self) -> dict[str, Tensor]:
        return {name: value.detach().clone() for name, value in self._adapter().items()}

    @property
    def _is_dora(self) -> bool:
        return self.config.lora.variant == "dora"

    def _merge(self) -> None:
        """Merges DoRA into the weights; an adapter of zeros takes its place until the cut.

        Masks, the refit and the cut take factors apart, and DoRA's norms are of whole rows.
        """
        self._merged = self._adapter_copy()
        self.bind(self._wrapped(merge_adapter(self.adapted), "lora"))
        self.pruning.take(self.adapted)

    def _train_all(self, *, merged: bool) -> None:
        """Goes on with all weights of the cut model in place of its adapter, which is merged into them if asked for."""
        self.pruning.model = whole_model(self.adapted, merged=merged)
        self.pruning.refitted = []  # checkpoints hold all weights from here on
        self.bind(self.pruning.model)

    def _renew(self) -> None:
        """Gives the cut model a DoRA adapter that has learned nothing yet, in place of the one of zeros."""
        self.bind(self._wrapped(base_of(self.model), "dora"))
        self.pruning.model = self.model

    def _wrapped(self, model: PreTrainedModel, variant: LoraVariant) -> PeftModel:
        lora = self.config.lora.model_dump() | {"variant": variant}
        return add_lora(model, self.space, **lora, seed=self.config.seed)

    def _freeze(self) -> None:
        self.pruning.judge_in_rounds(self.clock.timed)
        self.begin("settle")
        with self.clock.timed("settle"):
            self.pruning.freeze()
        self._validate_as("masked")
        if self.config.decisions.refit_windows:
            with self.clock.timed("refit"):
                self.pruning.refit()
            self._validate_as("refitted")
        if self.phases.settle == 0:
            self.pruning.shrink(steps_left=0)

    def _cut(self) -> None:
        """Cuts model and optimizer, writes the checkpoint that tune starts from, and continues from it."""
        with self.clock.timed("cut"):
            state = self.checkpoint()
            state.replace("refit", {})  # a checkpoint on a CPU shares them with the uncut model, which goes
            self.pruning.cut(swap=self.bind)
            for prefix in ("model", "lora_optimizer"):
                part = cut_state_dict(state.part(prefix), self.space, self.decisions.mask)
                state.replace(prefix, part)  # whole blocks may be gone
            if self.config.training.after_cut == "full":
                self._train_all(merged=True)
                state.replace("model", self._adapter())
                state.replace("lora_optimizer", {})
                state.replace("refit", {})
            elif self._is_dora:
                self._renew()
                state.replace("model", self._adapter())
            self.pruning.add_refit(state)
        self._validate_as("cut")
        state.tensors |= checkpoints.prefixed("best", self.validation.adapter)
        state.meta |= {
            "cut": True, "certificate": self.certificate, "clock": self.clock.state(),
            "validation": self.validation.state(),
        }  # fmt: skip
        self.load(checkpoints.load(self.write(state)))
        # A signal in the last step before the cut is answered here: there is no checkpoint between them.
        self.end_on_signal()

    def _validate_as(self, model: str) -> None:
        """Scores what the model has just become, between steps. model: its name in the summary."""
        if self.validation.every:
            self.validation.becoming[model] = self.validate()

    def as_scored(self) -> AbstractContextManager[Any]:
        masked = self.phase in ("search", "settle") and not self.pruning.is_cut
        return self.pruning.still() if masked else super().as_scored()

    @property
    def final_shape(self) -> bool:
        return self.pruning.is_cut

    def export(self, folder: str | Path) -> dict[str, Any]:
        """Writes model/, the decisions and certificate.json under `folder`; returns the certificate.

        With `export.keep_adapter` also base/ and adapter/. The main process writes; the others wait for it. Raises
        `NotReached` for a merged weight that is not finite.
        """
        heap.give_back()
        self.certificate.update(processes.together(lambda: self._export(Path(folder))))
        return self.certificate

    def _export(self, folder: Path) -> dict[str, Any]:
        if processes.is_main():
            folder.mkdir(parents=True, exist_ok=True)
            save_decisions(folder, self.space, self.decisions.mask)
        after = sum(p.numel() for n, p in self.model.named_parameters() if "lora_" not in n)
        shapes: Any = causal_of(self.model).config
        stock = stock_config(shapes) is not None
        card = model_card(self.config, self.params_before, after, stock=stock, gone=shapes.gone())
        tokens = self.pruning.certificate_tokens()
        certificate = self.certificate | export_model(self.model, folder, self.tokenizer, tokens, card)
        load_in = self.config.model.load_in
        if load_in is not None:
            certificate["base"] = f"{FORMS[load_in].says}: the masked and the cut model are compared on these weights"
        if self.config.training.beside_lora:
            certificate["trained besides LoRA"] = self.config.training.beside_lora
        if self.config.export.keep_adapter:
            keep_adapter(self.adapted, folder, self.tokenizer, self.config)
        if processes.is_main():
            certificate = write_certificate(folder / "certificate.json", certificate, tokens)
        return certificate

    # What this run adds to those of every run

    def check(self) -> None:
        super().check()
        self.decisions.finite.report()

    def record(self) -> Record:
        return self.pruning.record(self.step - self.phases.open) if self.phase in ("search", "settle") else {}

    def samples(self) -> dict[str, Dataset]:
        return {**super().samples(), "calibration": self.pruning.calibration}

    def checkpoint(self) -> Checkpoint:
        state = super().checkpoint()
        self.pruning.add_to(state)
        state.tensors |= checkpoints.prefixed("merged", self._merged)
        return state

    def _restore(self, state: Checkpoint) -> None:
        self.refuse_other_run(state)
        merged = state.part("merged")
        if merged:
            self._set_adapter(merged)
            self._merge()
        self.pruning.load(state)
        if self.pruning.is_cut:
            self.bind(self.pruning.model)
            if self.config.training.after_cut == "full":
                self._train_all(merged=False)
            elif self._is_dora:
                self._renew()
        self.load(state)
        self.pruning.autocast = self.autocast_dtype
