"""`ATPTrainer`: the one-stage job. `train` runs open, search, settle, cut and tune, in this order, in one loop.

The cut is a checkpoint rewritten for the smaller model, so a resumed run and an unbroken one take the same path.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase, set_seed

from atp import processes
from atp.checks import check_reachable
from atp.config import ATPConfig
from atp.decide.decisions import Decisions
from atp.errors import InputError
from atp.export.card import model_card
from atp.export.hf import export_model, keep_adapter, save_decisions
from atp.loading import load_data, load_model, load_tokenizer
from atp.lora.layer import add_lora
from atp.models.stock import stock_config
from atp.removal import cut_state_dict
from atp.spaces.space import MaskSpace
from atp.targets import with_share
from atp.training import checkpoint as checkpoints
from atp.training.callbacks import Callback, Record
from atp.training.certificate import write_certificate
from atp.training.checkpoint import Checkpoint
from atp.training.distill import Teacher
from atp.training.loop import Loop, open_step, search_step, settle_step, tune_step
from atp.training.pruning import Pruning
from atp.training.resume import fingerprints
from atp.training.schedule import Phases


class ATPTrainer(Loop):
    """Tunes a causal LM with LoRA and removes structures in the same run.

    model: a Llama-like causal LM (stock transformers). train_dataset and calibration_dataset yield dictionaries with
    `input_ids` and `labels` int64 [length], as the datasets of `atp.data` do. Raises `InputError` for a model that the
    mask space does not cover.
    """

    def __init__(
        self,
        config: ATPConfig,
        model: PreTrainedModel,
        train_dataset: Dataset,
        calibration_dataset: Dataset,
        *,
        tokenizer: PreTrainedTokenizerBase | None = None,
        callbacks: Sequence[Callback] = (),
    ) -> None:
        lora, space = config.lora, MaskSpace.from_config(model.config, config.decisions.space)
        params_before = sum(p.numel() for p in model.parameters())
        wrapped = add_lora(model, space, r=lora.r, alpha=lora.alpha, dropout=lora.dropout, seed=config.seed)
        phases = Phases.from_config(config.training)
        super().__init__(
            config, wrapped, train_dataset, Path(config.output_dir), phases, tokenizer=tokenizer, callbacks=callbacks
        )
        self.params_before = params_before
        self._taught: dict[str, Tensor] = {}  # the adapter that the teacher was made with
        self.pruning = Pruning(
            self.model, space, calibration_dataset, config.decisions, config.training, seed=config.seed,
            autocast=self.autocast_dtype,
        )  # fmt: skip

    @classmethod
    def from_config(cls, config: ATPConfig, callbacks: Sequence[Callback] = ()) -> ATPTrainer:
        """Loads tokenizer, data and model that the config names. Raises `InputError` for what is wrong with them."""
        config = with_share(config)
        tokenizer = load_tokenizer(config.model)
        data = load_data(config, tokenizer)
        model = load_model(config.model, config.decisions.space)
        check_reachable(config, model.config)
        inputs = fingerprints(model, tokenizer, train=data.train, calibration=data.calibration)
        trainer = cls(config, model, data.train, data.calibration, tokenizer=tokenizer, callbacks=callbacks)
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
        path = self.resume_point(resume)
        if resume and path is None:
            raise InputError(f"nothing to resume: {self.checkpoint_root} holds no complete checkpoint")
        phases, pruning = self.phases, self.pruning
        self._restore(checkpoints.load(path)) if path else self._start()
        with self.session():
            self.run("open", partial(open_step, self, pruning), until=phases.open)
            if not pruning.scored:
                self._score()
            if self.teacher is None and self.config.training.distill and phases.open:
                self._teach()
            self.run("search", partial(search_step, self, pruning), until=phases.freeze_step)
            if not self.decisions.frozen:
                self._freeze()
            self.run("settle", partial(settle_step, self, pruning), until=phases.cut_step)
            if not pruning.is_cut:
                self._cut()
            self.run("tune", partial(tune_step, self), until=phases.total)

    def _start(self) -> None:
        set_seed(self.config.seed)  # whatever this process drew before must not matter
        if self.config.decisions.source == "static":
            self._score()

    def _score(self) -> None:
        with self.clock.timed("saliency"):
            self.pruning.start()

    def _teach(self) -> None:
        """Makes the model as it is the teacher of all later steps."""
        self._taught = {name: self.model.get_parameter(name).detach().clone() for name in self._trained}
        self.teacher = Teacher(self.model, self.config.training.distill, self.autocast_dtype)

    def _freeze(self) -> None:
        self.begin("settle")
        with self.clock.timed("settle"):
            self.pruning.freeze()
        if self.config.decisions.refit_windows:
            with self.clock.timed("refit"):
                self.pruning.refit()
        if self.phases.settle == 0:
            self.pruning.shrink(steps_left=0)

    def _cut(self) -> None:
        """Cuts model and optimizer, writes the checkpoint that tune starts from, and continues from it."""
        with self.clock.timed("cut"):
            state = self.checkpoint()
            self.pruning.cut(swap=self.bind)
            for prefix in ("model", "lora_optimizer", "refit"):
                part = cut_state_dict(state.part(prefix), self.space, self.decisions.mask)
                state.tensors |= checkpoints.prefixed(prefix, part)
        state.meta |= {"certificate": self.certificate, "clock": self.clock.state()}
        self.load(checkpoints.load(self.write(state)))
        # A signal in the last step before the cut is answered here: there is no checkpoint between them.
        self.end_on_signal()

    def export(self, folder: str | Path) -> dict[str, Any]:
        """Writes model/, the decisions and certificate.json under `folder`; returns the certificate.

        With `export.keep_adapter` also base/ and adapter/. The main process writes; the others wait for it. Raises
        `NotReached` for a merged weight that is not finite.
        """
        self.certificate.update(processes.on_main(lambda: self._export(Path(folder))))
        return self.certificate

    def _export(self, folder: Path) -> dict[str, Any]:
        folder.mkdir(parents=True, exist_ok=True)
        save_decisions(folder, self.space, self.decisions.mask)
        after = sum(p.numel() for n, p in self.model.named_parameters() if "lora_" not in n)
        stock = stock_config(self.model.get_base_model().config) is not None
        card = model_card(self.config, self.params_before, after, stock=stock)
        tokens = self.pruning.certificate_tokens()
        certificate = self.certificate | export_model(self.model, folder, self.tokenizer, tokens, card)
        if self.config.export.keep_adapter:
            keep_adapter(self.model, folder, self.tokenizer, self.config)
        write_certificate(folder / "certificate.json", certificate, tokens)
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
        state.tensors |= checkpoints.prefixed("teacher", self._taught)
        return state

    def _restore(self, state: Checkpoint) -> None:
        self.refuse_other_run(state)
        taught = state.part("teacher")
        if taught:
            with torch.no_grad():
                for name, value in taught.items():
                    self.model.get_parameter(name).copy_(value)
            self._teach()
        self.pruning.load(state)
        if self.pruning.is_cut:
            self.bind(self.pruning.model)
        self.load(state)
        self.pruning.autocast = self.autocast_dtype
