"""The run of a baseline: choose on the pretrained model, apply, tune, export and score, in a folder like ATP's own."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from atp import processes
from atp.baselines.calibration import first_tokens
from atp.baselines.methods import BASELINES, MaskBaseline
from atp.baselines.tuner import LoraTuner
from atp.config import ATPConfig
from atp.export.card import baseline_card
from atp.export.hf import export_model, save_decisions
from atp.loading import RunData, check_length
from atp.lora.layer import add_lora
from atp.masks.space import MaskSpace
from atp.run import Run, quiet
from atp.training.arguments import training_arguments
from atp.training.callbacks import ProgressCallback, make_progress

_CHECKED_WINDOWS = 4


class BaselineRun(Run):
    """One run folder of a baseline; what is chosen, tuned or scored is not done again on resume."""

    def __init__(
        self, method: str, config: ATPConfig, *, resume: bool, command: str, say: Callable[[str], None] = print
    ) -> None:
        """method: a key of `BASELINES`."""
        super().__init__(config, resume=resume, command=command, say=say)
        self.method, self.baseline = method, BASELINES[method]

    def _execute(self) -> dict[str, Any]:
        model, tokenizer, data = self._prepare()
        params_before = sum(p.numel() for p in model.parameters())
        space = MaskSpace.from_config(model.config)
        if self.baseline is not None:
            model = self._apply(model, data)
        tuner = self._tune(model, space, data)
        gap = self._export(tuner, tokenizer, data, params_before)
        facts = {"method": self.method, "reload_gap": gap, "skipped_steps": tuner.finite.skipped}
        chosen = processes.on_main(self._scores).get("choice")
        if chosen is not None:
            tuner.clock.add("choose", chosen["seconds"])
        return processes.on_main(lambda: self._conclude(tokenizer, data, tuner.clock, facts))

    def _check_model(self, model: nn.Module) -> None:
        """A baseline promises no share: the table shows what it kept."""
        check_length(model, self.config.data.length)

    def _apply(self, model: nn.Module, data: RunData) -> nn.Module:
        """The smaller model; the choice is made once and kept, so that a resumed run tunes the same one."""
        model = model.to(training_arguments(self.config).device)
        choice = processes.on_main(lambda: self._choose(model, data))
        return self.baseline.apply(model, choice, data.calibration, self.config)

    def _choose(self, model: nn.Module, data: RunData) -> Tensor:
        path = self.folder / "choice.safetensors"
        if path.is_file() and "choice" in self._scores():
            choice = load_file(path)["choice"]
        else:
            self.say(f"{self.method}: choosing what to remove from the pretrained model")
            started = time.perf_counter()
            choice = self.baseline.choose(model, data.calibration, self.config)
            save_file({"choice": choice.contiguous()}, path)
            self._record("choice", {"seconds": time.perf_counter() - started})
        if isinstance(self.baseline, MaskBaseline):
            save_decisions(self.folder, self.baseline.space_of(model, self.config), choice)
        return choice

    def _tune(self, model: nn.Module, space: MaskSpace, data: RunData) -> LoraTuner:
        lora, steps = self.config.lora, self.config.training.total
        wrapped = add_lora(model, space, r=lora.r, alpha=lora.alpha, dropout=lora.dropout, seed=self.config.seed)
        with make_progress() as progress:
            bar = ProgressCallback(lambda step: self.method, steps, progress)
            tuner = LoraTuner(self.config, wrapped, data.train, self.folder, callbacks=[bar])
            quiet(tuner)
            tuner.train(resume=self.resume)
        return tuner

    def _export(self, tuner: LoraTuner, tokenizer: PreTrainedTokenizerBase, data: RunData, params_before: int) -> float:
        """Writes adapter/ and model/; returns the largest logit difference after reloading, as a share of the scale."""
        after = sum(p.numel() for n, p in tuner.model.named_parameters() if "lora_" not in n)
        card = baseline_card(self.config, self.method, params_before, after)
        tokens = first_tokens(data.calibration, _CHECKED_WINDOWS).to(tuner.args.device)
        return processes.on_main(lambda: export_model(tuner.model, self.folder, tokenizer, tokens, card).relative)
