"""A whole run: load, score the original, tune the dense baseline, train, export, score, write summary and report."""

from __future__ import annotations

import json
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import yaml
from rich.progress import Progress
from torch import nn
from transformers import PreTrainedTokenizerBase

from atp import processes
from atp.baselines.dense_lora import PHASE, stock_lora
from atp.baselines.tuner import LoraTuner
from atp.checks import BUDGET_TOLERANCE, check_reachable, shortfalls
from atp.config import ATPConfig
from atp.data import Splits, Task
from atp.environment import versions
from atp.errors import Interrupted, NotReached
from atp.evaluation import evaluate_model, model_size, packed_windows, relative_performance, throughput
from atp.evaluation.generation import check_rouge
from atp.evaluation.inference import bars
from atp.files import write_json
from atp.loading import RunData, check_output_dir, load_data, load_model, load_tokenizer
from atp.models.load import read_model
from atp.report import write_report
from atp.training.callbacks import ProgressCallback, make_progress
from atp.training.checkpoint import newest
from atp.training.metrics import PhaseClock
from atp.training.precision import autocast_dtype
from atp.training.profiling import ProfileCallback, format_table
from atp.training.trainer import ATPTrainer

CERTIFICATE_TOLERANCE = 1e-3  # of the logit scale, in float32


class Run:
    """One run folder and the steps that fill it. Steps that are done are not repeated on resume."""

    def __init__(
        self,
        config: ATPConfig,
        *,
        resume: bool,
        command: str,
        say: Callable[[str], None] = print,
        profile: bool = False,
    ) -> None:
        """say prints one line. profile: also trace a few steps of each phase into the run folder's profile/."""
        self.config, self.resume, self.command = config, resume, command
        self.say = say if processes.is_main() else lambda line: None
        self.profile = profile and processes.is_main()
        self.folder = Path(config.output_dir)
        self.started = time.perf_counter()
        processes.start()
        self.autocast = processes.on_main(lambda: autocast_dtype(config.training.precision))

    def execute(self) -> dict[str, Any]:
        """Does everything and returns the summary. Raises `InputError`, `NotReached` or `Interrupted`."""
        try:
            return self._execute()
        except KeyboardInterrupt:
            # Outside the training loop, which catches signals itself; what is scored and tuned so far is on disk.
            raise Interrupted(signal.SIGINT, str(newest(self.folder / "checkpoints") or "none yet")) from None

    def _execute(self) -> dict[str, Any]:
        model, tokenizer, data = self._prepare()
        if self.config.evaluation.dense_baseline and "tuned_dense" not in processes.on_main(self._scores):
            model = self._tune_dense(model, tokenizer, data)
        trainer = ATPTrainer(self.config, model, data.train, data.calibration, tokenizer=tokenizer)
        del model  # the trainer lets go of the uncut weights at the cut, and nobody else may hold them then
        self._train(trainer)
        self.say("exporting and certifying")
        trainer.export(self.folder)
        facts = {"certificate": trainer.certificate, "skipped_steps": trainer.finite.skipped}
        summary = processes.on_main(lambda: self._conclude(tokenizer, data, trainer.clock, facts))
        check_promises(summary)
        return summary

    def _prepare(self) -> tuple[nn.Module, PreTrainedTokenizerBase, RunData]:
        """Checks everything before anything is written, then opens the folder and scores the original."""
        config = self.config
        processes.on_main(self._check_folder)
        tokenizer = processes.main_first(lambda: load_tokenizer(config.model))
        data = processes.main_first(lambda: load_data(config, tokenizer))
        if any(not task.labels for task in scored_tasks(self.config, data.splits)):
            check_rouge()
        for line in (data.splits.description, *shortfalls(config, data)):
            self.say(line)
        model = processes.main_first(lambda: load_model(config.model, config.decisions.space))
        self._check_model(model)
        processes.on_main(self._open_folder)
        self._score("original", model, tokenizer, data)
        return model, tokenizer, data

    def _check_folder(self) -> None:
        check_output_dir(self.folder, resume=self.resume)
        started_under = self.folder / "config.yaml"
        if started_under.is_file():
            self.config.refuse_change_of(yaml.safe_load(started_under.read_text(encoding="utf-8")))

    def _open_folder(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / "config.yaml").write_text(self.config.dump(), encoding="utf-8")

    def _check_model(self, model: nn.Module) -> None:
        """Raises `InputError` when the model cannot keep what the run promises."""
        check_reachable(self.config, model, BUDGET_TOLERANCE)

    def _tune_dense(self, model: nn.Module, tokenizer: PreTrainedTokenizerBase, data: RunData) -> nn.Module:
        self.say("tuning the uncut model with stock LoRA, for comparison")
        folder = self.folder / PHASE
        with make_progress() as progress:
            bar = ProgressCallback(lambda step: PHASE, self.config.training.total, progress)
            tuner = LoraTuner(
                self.config, stock_lora(model, self.config), data.train, folder, phase=PHASE, callbacks=[bar]
            )
            quiet(tuner)
            tuner.train(resume=self.resume)
        self._score("tuned_dense", tuner.model, tokenizer, data)
        costs = {"seconds": tuner.clock.seconds[PHASE], "tokens_per_second": tuner.clock.rate(PHASE)}
        processes.on_main(lambda: self._record(PHASE, costs))
        return tuner.model.unload()

    def _train(self, trainer: ATPTrainer) -> None:
        phases = trainer.phases
        profile = ProfileCallback(self.folder / "profile", phases.of, phases.total)
        if self.profile:
            trainer.add_callback(profile)
        with make_progress() as progress:
            trainer.add_callback(ProgressCallback(phases.of, phases.total, progress))
            quiet(trainer)
            trainer.train(resume=processes.on_main(lambda: newest(trainer.checkpoint_root)) is not None)
        if profile.rows:
            self.say(format_table(profile.rows))

    def _score(self, name: str, model: nn.Module, tokenizer: PreTrainedTokenizerBase, data: RunData) -> None:
        """Scores a model once, in the main process; the result is kept in evaluation.json."""
        processes.on_main(lambda: self._score_once(name, model, tokenizer, data))

    def _score_once(self, name: str, model: nn.Module, tokenizer: PreTrainedTokenizerBase, data: RunData) -> None:
        if name in self._scores():
            return
        settings = self.config.evaluation
        with Progress(transient=True) as progress:
            scores = evaluate_model(
                model, tokenizer, packed_windows(data.test, tokenizer), data.splits.test,
                tasks=scored_tasks(self.config, data.splits), batch_size=settings.batch_size,
                max_windows=settings.windows, max_examples=settings.questions,
                seed=self.config.seed, autocast=self.autocast,
                progress=bars(progress, f"scoring the {name.replace('_', ' ')} model"),
            )  # fmt: skip
        scores |= {"size": model_size(model, torch.float32)}
        if name != "tuned_dense":
            scores["speed"] = throughput(model, autocast=self.autocast)
        self._record(name, scores)

    def _scores(self) -> dict[str, Any]:
        path = self.folder / "evaluation.json"
        return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}

    def _record(self, name: str, value: dict[str, Any]) -> None:
        """Adds to evaluation.json, in the main process."""
        write_json(self.folder / "evaluation.json", self._scores() | {name: value})

    def _conclude(
        self, tokenizer: PreTrainedTokenizerBase, data: RunData, clock: PhaseClock, facts: dict[str, Any]
    ) -> dict[str, Any]:
        """Scores the exported model, writes summary and report, and returns the summary, `facts` among it."""
        final = read_model(self.folder / "model", dtype=torch.float32)
        self._score_once("final", final, tokenizer, data)
        summary = self._summarise(data, clock) | facts
        write_json(self.folder / "summary.json", summary)
        write_report(self.folder)
        return summary

    def _summarise(self, data: RunData, clock: PhaseClock) -> dict[str, Any]:
        scores = self._scores()
        models = [name for name in ("original", "tuned_dense", "final") if name in scores]
        before, after = scores["original"]["size"], scores["final"]["size"]
        rates = {phase: clock.rate(phase) for phase, tokens in clock.tokens.items() if tokens}
        if "dense_lora" in scores:
            rates["dense_lora"] = scores["dense_lora"]["tokens_per_second"]
        tasks = scored_tasks(self.config, data.splits)
        relative = {}
        if "tuned_dense" in scores:
            relative = relative_performance(scores["final"], scores["tuned_dense"], tasks, self.config.seed)
        return {
            "target_keep": self.config.decisions.target_keep,
            "keep_decoder": after["decoder_params"] / before["decoder_params"],
            "keep_total": after["params"] / before["params"],
            "params_before": before["params"],
            "params_after": after["params"],
            "megabytes": {"original": before["megabytes"], "final": after["megabytes"]},
            "perplexity": {name: scores[name]["perplexity"] for name in models},
            "perplexity_interval": {name: scores[name]["perplexity_interval"] for name in models},
            "tasks": [task.name for task in tasks],
            **{
                task.name: {name: _without_items(scores[name]["tasks"][task.name]) for name in models} for task in tasks
            },
            **relative,
            "speed": {name: scores[name]["speed"] for name in ("original", "final")},
            "train_tokens": sum(clock.tokens.values()),
            "train_tokens_per_second": rates,
            "seconds": clock.seconds | {"total": time.perf_counter() - self.started},
            "seed": self.config.seed,
            "data": data.splits.fingerprints | {"description": data.splits.description},
            "versions": versions(),
            "command": self.command,
        }


def scored_tasks(config: ATPConfig, splits: Splits) -> list[Task]:
    """The tasks that a run scores."""
    settings = config.evaluation
    return [task for task in splits.tasks if settings.questions and (task.labels or settings.generate)]


def _without_items(scores: dict[str, Any]) -> dict[str, Any]:
    """What anyone would quote; the single items stay in evaluation.json."""
    return {key: value for key, value in scores.items() if key != "items"}


def quiet(trainer: Any) -> None:
    """Leaves the terminal to our own bar."""
    from transformers import PrinterCallback

    trainer.remove_callback(PrinterCallback)


def check_promises(summary: dict[str, Any]) -> None:
    """Raises `NotReached` when budget or certificate were missed; everything was written by then."""
    certificate = summary["certificate"]
    for name in ("masked_vs_cut", "cut_vs_reloaded"):
        if certificate[name] > CERTIFICATE_TOLERANCE:
            raise NotReached(f"certificate: {name} is {certificate[name]:.2e} of the logit scale, above 1e-3")
    if certificate["removed_lora_norm"] > 0:
        raise NotReached(f"certificate: a removed LoRA group kept norm {certificate['removed_lora_norm']:.2e}")
    missed = abs(summary["keep_decoder"] - summary["target_keep"])
    if missed > BUDGET_TOLERANCE:
        raise NotReached(
            f"budget: {summary['keep_decoder']:.4f} of the decoder is kept, target {summary['target_keep']}: the "
            "width rules (decisions.multiples) are too coarse for this model, lower them"
        )
