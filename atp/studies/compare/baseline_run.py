"""The run of a baseline: choose on the pretrained model, apply, tune, export and score, in a folder like ATP's own."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from peft import PeftModel
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from atp.baselines.calibration import choice_samples
from atp.baselines.methods import BASELINES, Baseline, MaskBaseline
from atp.baselines.tuner import LoraTuner
from atp.config import ATPConfig
from atp.decide.given import check_given
from atp.export.card import baseline_card
from atp.export.hf import export_model, keep_adapter, save_decisions
from atp.ground import progress
from atp.ground.errors import InputError
from atp.ground.files import write_tensors
from atp.inputs.loading import RunData, check_length, placed
from atp.inputs.promises import check_figures
from atp.models.stock import stock_config
from atp.processes import processes
from atp.removal.certify import AT_EXPORT, certificate_tokens, check_certificate
from atp.run import Run
from atp.training.callbacks import ProgressBar, make_progress


class BaselineRun(Run):
    """One run folder of a baseline; choices, tuning and scores that are finished are not repeated on resume."""

    def __init__(self, method: str, config: ATPConfig, **options: Any) -> None:
        """method: a key of `BASELINES`. options: those of `Run`."""
        super().__init__(config, **options)
        self.method, self.baseline = method, BASELINES.get(method)
        self.facts: dict[str, Any] = {"method": method}  # of the summary

    def _execute(self) -> dict[str, Any]:
        model, tokenizer, data = self._prepare()
        adapt = self._adapter_of(model, self.config)
        seconds: dict[str, float] = {}
        if self.baseline is not None:
            model, seconds = self._apply(self.baseline, model, data)
        tuner = self._tune(adapt(model), data)
        certificate = self._export(tuner, tokenizer, data, self.params_before)
        certificate |= self._words_certified()
        facts = {**self.facts, "certificate": certificate, "skipped_steps": tuner.finite.skipped,
                 **tuner.validation.summary(tuner.step)}  # fmt: skip
        clock = tuner.clock
        for phase, value in seconds.items():
            clock.add(phase, value)
        del model, tuner  # the models that are scored and timed now have their memory
        return self._conclude(tokenizer, data, clock, facts)

    def _check(self, summary: dict[str, Any]) -> None:
        """A baseline does not promise to meet the budget, only a faithful export."""
        check_certificate(summary["certificate"], AT_EXPORT)
        check_figures(summary)

    def _check_model(self, model: PreTrainedModel) -> None:
        """A baseline does not promise the target share; the table shows what it kept."""
        check_length(model.config, self.config.data.length)
        if self.config.decisions.path is not None and self.method != "static":
            raise InputError(f"{self.method} removes what its own rule says: leave out decisions.path")
        processes.on_main(lambda: check_given(self.config.decisions, model.config))
        if processes.sharded():
            raise InputError(f"{self.method} needs whole weights in every process: leave out training.sharding=fsdp")
        load_in = self.config.model.load_in
        if load_in is not None:
            raise InputError(f"{self.method} does not run on a quantized base: leave out model.load_in={load_in}")

    def _apply(
        self, baseline: Baseline, model: PreTrainedModel, data: RunData
    ) -> tuple[PreTrainedModel, dict[str, float]]:
        """The smaller model and the seconds of choosing and of applying, which a refit is part of.

        The choice is saved, so that a resumed run tunes the same model.
        """
        model = placed(model)
        choice = processes.on_main(lambda: self._choose(baseline, model, data))
        choosing = processes.on_main(self._scores)["choice"]["seconds"]
        started = time.perf_counter()
        smaller = baseline.apply(model, choice, data.calibration, self.config)
        return smaller, {"choose": choosing, "apply": time.perf_counter() - started}

    def _choose(self, baseline: Baseline, model: PreTrainedModel, data: RunData) -> Tensor:
        path = self.folder / "choice.safetensors"
        choice = _read_choice(path) if "choice" in self._scores() else None
        if choice is None:
            progress.begin("choosing")
            self.say(f"{self.method}: choosing what to remove from the pretrained model")
            started = time.perf_counter()
            samples = choice_samples(data.train, data.calibration, self.config)
            choice = baseline.choose(model, samples, self.config)
            write_tensors(path, {"choice": choice.contiguous()})
            self._record(choice={"seconds": time.perf_counter() - started})
        if isinstance(baseline, MaskBaseline):
            save_decisions(self.folder, baseline.space_of(model, self.config), choice)
        return choice

    def _tune(self, wrapped: PeftModel, data: RunData) -> LoraTuner:
        steps = self.config.training.total
        with make_progress() as bars:
            bar = ProgressBar(bars, steps, title=self.method)
            tuner = LoraTuner(
                self.config, wrapped, data.train, self.folder, validation=data.validation, callbacks=[bar]
            )
            self._hand_over(tuner)
            tuner.train(resume=self.resume)
        return tuner

    def _export(
        self, tuner: LoraTuner, tokenizer: PreTrainedTokenizerBase, data: RunData, params_before: int
    ) -> dict[str, Any]:
        """Writes model/ and, with `export.keep_adapter`, base/ and adapter/; returns the result of `certify_export`."""
        after = sum(p.numel() for n, p in tuner.model.named_parameters() if "lora_" not in n)
        stock = stock_config(tuner.adapted.get_base_model().config) is not None
        card = baseline_card(self.config, self.method, params_before, after, stock=stock)
        tokens = certificate_tokens(data.calibration).to(tuner.device)

        def write() -> dict[str, Any]:
            certificate = export_model(tuner.model, self.folder, tokenizer, tokens, card)
            if self.config.export.keep_adapter:
                keep_adapter(tuner.adapted, self.folder, tokenizer, self.config)
            return certificate

        return processes.on_main(write)


def _read_choice(path: Path) -> Tensor | None:
    """The saved choice; None if the file is missing or damaged, since choosing again gives the same."""
    try:
        return load_file(path)["choice"]
    except (OSError, KeyError, SafetensorError):
        return None
