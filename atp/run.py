"""A whole run: load, score the original, tune the dense baseline, train, export, score, write summary and report."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, cast

from peft import PeftModel
from torch.nn import Parameter
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from atp.baselines.tuner import DENSE, LoraTuner
from atp.config import ATPConfig, ResolvedConfig
from atp.decide.given import check_given
from atp.evaluation import evaluate_model, model_size, packed_windows, relative_performance, throughputs
from atp.evaluation.answers import answered_question
from atp.evaluation.inference import CausalLM, bars
from atp.evaluation.perplexity import ScoredWindows, bytes_of, windows_of
from atp.evaluation.samples import held_out_samples, sample_answers, side_by_side
from atp.evaluation.scored_tasks import check_tasks, majority_of, scored_tasks, without_items
from atp.export.card import add_results, license_of
from atp.export.origins import origins
from atp.families import FAMILIES, family_name
from atp.ground import heap, progress
from atp.ground.environment import versions
from atp.ground.errors import InputError, Interrupted, is_out_of_memory, reason
from atp.ground.files import read_json, write_json, write_text
from atp.ground.signals import SignalGuard
from atp.inputs import folders, loading
from atp.inputs.checks import check_sharded, less_memory, outline, rounding, run_remarks
from atp.inputs.folders import (
    CONFIG,
    INPUTS,
    LATENCY,
    LENGTH,
    RESOLVED,
    SKIPPED,
    VOCABULARY,
    check_output_dir,
    opened,
    refuse_inputs_inside,
    saved_config,
)
from atp.inputs.loading import (
    RunData,
    averages,
    check_packages,
    held_out,
    load_data,
    load_model,
    load_shapes,
    load_tokenizer,
    placed,
    weights_dtype,
)
from atp.inputs.precision import autocast_dtype, slow_precision
from atp.inputs.promises import check_promises, check_target
from atp.inputs.resolve import resolve
from atp.inputs.targets import share_of
from atp.lora.layer import add_lora, stock_modules, unload
from atp.models.load import read_config, read_model
from atp.plan.latency import measured_target
from atp.plan.length import measured_length
from atp.plan.parameters import parameters_of
from atp.processes import kernels, processes
from atp.removal.certify import WORDS_CUT, certificate_tokens, rounding_remark
from atp.removal.masters import store_embeddings
from atp.report import write_report
from atp.report.beside import bits_per_byte, perplexity_of
from atp.sharding.read import read_sharded
from atp.spaces.space import MaskSpace
from atp.training import checkpoint as checkpoints
from atp.training.callbacks import ProgressBar, check_trackers, make_progress
from atp.training.checkpoint import newest
from atp.training.loop import Loop
from atp.training.metrics import PhaseClock
from atp.training.profiling import Profiler, format_table
from atp.training.prometheus import check_metrics_file
from atp.training.resume import (
    begun,
    fingerprints,
    inputs_of,
    of_model_folder,
    of_words,
    refuse_other_config,
    refuse_other_data,
    refuse_other_inputs,
)
from atp.training.trainer import ATPTrainer
from atp.vocabulary.vocabulary import Vocabulary, words_remark, written


class Run:
    """A whole run, as `atp train` does it: `Run(config).execute()` fills the run folder. Resuming repeats no step."""

    def __init__(
        self,
        config: ATPConfig,
        *,
        resume: bool = False,
        command: str = "atp.Run(config).execute()",
        say: Callable[[str], None] = print,
        outlined: bool = False,
        profile: bool = False,
        original: Callable[[dict[str, str]], dict[str, Any] | None] = lambda inputs: None,
        recorded_dense: dict[str, Any] | None = None,
    ) -> None:
        """command: said in the results as what made them. say prints one line. outlined: also say what the run will do.
        profile: also trace a few steps of each phase into the run folder's profile/.
        original: asked with the fingerprints of the inputs, in the main process and before anything is written, for
        scores of the original model that somebody has taken already.
        recorded_dense: scores of the tuned dense model from an earlier run, quoted if this one tunes none.
        """
        self.asked, self.command, self.folder = config, command, Path(config.output_dir)
        self.say = progress.saying(say) if processes.is_main() else lambda line: None
        self.outlined, self.profile = outlined, profile and processes.is_main()
        self.original, self.recorded_dense = original, recorded_dense
        self.config: ResolvedConfig  # what the run computes with, once its data are known
        self.started = time.perf_counter()
        processes.start(config.training.sharding, {"--resume": resume} | config.model_dump())
        self.resume = resume or processes.on_main(lambda: folders.begun_by_this_launch(self.folder))
        self.latency: dict[str, Any] | None = None  # what was measured for a target in milliseconds
        self.vocabulary: Vocabulary | None = None  # the words that stay, once the data are known
        self.text: int | None = None  # bytes of held-out text that a model of other words is scored on
        self.params_before = 0  # of the whole model
        self.length: dict[str, Any] | None = None  # what a length in minutes or tokens came to

    def execute(self) -> dict[str, Any]:
        """Does what is left to do and returns the summary. Raises `InputError`, `NotReached` or `Interrupted`.

        A run that is finished is left as it is.
        """
        try:
            with SignalGuard(at_once=True), ExitStack() as self._open:
                summary = processes.on_main(self._look) or self._execute()
        except Interrupted as error:
            raise error if error.remedy else Interrupted(error.signum, self._way_on()) from None
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            raise InputError(f"out of memory ({reason(error)}): {less_memory(self.asked)}") from error
        self._check(summary)
        return summary

    def _execute(self) -> dict[str, Any]:
        trainer, tokenizer, data = self._trainer()
        self._train(trainer)
        self.say("exporting and certifying")
        progress.begin("export")
        trainer.certificate.update(self._words_certified())
        trainer.export(self.folder)
        facts = {"certificate": trainer.certificate, "skipped_steps": trainer.finite.skipped,
                 "skipped_decision_steps": trainer.decisions.finite.skipped,
                 **trainer.validation.summary(trainer.step)}  # fmt: skip
        clock = trainer.clock
        del trainer  # the models that are scored and timed now have its memory
        return self._conclude(tokenizer, data, clock, facts)

    def _trainer(self) -> tuple[ATPTrainer, PreTrainedTokenizerBase, RunData]:
        """Prepares the run, tunes the dense model if the config asks for it, and hands the model to a trainer.

        The trainer lets go of the uncut weights at the cut, and nobody else may hold them then.
        """
        model, tokenizer, data = self._prepare()
        scores = processes.on_main(self._scores)
        if self.config.evaluation.dense_baseline and not {"tuned_dense", DENSE} <= scores.keys():
            model = self._tune_dense(model, tokenizer, data)
        samples = data.train, data.calibration
        trainer = ATPTrainer(self.config, model, *samples, validation=data.validation, tokenizer=tokenizer)
        trainer.params_before = self.params_before
        return trainer, tokenizer, data

    def _check(self, summary: dict[str, Any]) -> None:
        """Raises `NotReached` if the run broke a promise; everything is written by then."""
        if (remark := rounding_remark(summary["certificate"])) is not None:
            self.say(remark)
        check_promises(summary)

    def _look(self) -> dict[str, Any] | None:
        """Checks the folder and locks it if it exists; returns the summary of a finished run."""
        check_output_dir(self.folder, resume=self.resume)
        check_trackers(self.asked.training.report_to)
        check_metrics_file(self.asked.training.metrics_file)
        refuse_inputs_inside(self.asked, self.folder)
        if not self.resume:
            return None
        refuse_other_config(self.asked, self.folder)
        self._open.enter_context(opened(self.folder, resume=True))
        summary = read_json(self.folder / "summary.json")
        made = (summary or {}).get("model_sha256")
        if made is None or made != of_model_folder(self.folder / "model"):
            return None
        if not (self.folder / "report.html").is_file():
            write_report(self.folder)
        self.say(f"{self.folder} is finished and left as it is")
        return summary

    def _way_on(self) -> str:
        if not (self.folder / CONFIG).is_file():
            return "nothing was written yet, start again"
        return f"continue with --resume (checkpoint {newest(self.folder / 'checkpoints') or 'none yet'})"

    def _prepare(self) -> tuple[PreTrainedModel, PreTrainedTokenizerBase, RunData]:
        """Checks everything before anything is written, then opens the folder and scores the original.

        Returns the model and the tokenizer that are trained: those of the kept words under `vocabulary.keep`.
        """
        asked = self.asked
        kernels.check_once()
        known = processes.on_main(lambda: begun(asked)) if self.resume else None
        kept = processes.on_main(lambda: written(self.folder / VOCABULARY)) if self.resume else None
        if known is not None:
            measured = processes.on_main(lambda: [read_json(self.folder / name) for name in (LATENCY, LENGTH)])
            self.latency, self.length = measured
        progress.begin("loading")
        processes.on_main(lambda: check_packages(asked.model, asked.data))
        tokenizer = processes.main_first(lambda: load_tokenizer(asked.model))
        data = processes.main_first(lambda: load_data(known or asked, tokenizer, kept))
        refuse_other_data(data.tokenizer, data.splits)
        config, data = (known, data) if known else self._resolve(tokenizer, data)
        self.config = config
        shapes = load_shapes(config.model)
        check_sharded(config)
        check_tasks(config, data.splits, data.tokenizer, shapes)
        timed = [found["description"] for found in (self.latency, self.length) if found is not None]
        told = data.splits.remarks[1:] if self.outlined else data.splits.remarks  # the outline describes the data
        said = [*told, *timed, *slow_precision(config), *run_remarks(asked, config, shapes, data)]
        load = partial(self._load, config)
        with loading.reading("model"):
            model = load() if processes.sharded() else processes.main_first(load)
        self._check_model(model)
        self.inputs = fingerprints(model, tokenizer, **data.read_in_training)
        self.inputs["test data"] = data.splits.fingerprints["test"]  # questions too, not only what is packed
        if data.vocabulary is not None:
            self.inputs["vocabulary"] = of_words(data.vocabulary.kept)
            self.vocabulary = data.vocabulary
        processes.on_main(self._start)
        for line in (*(outline(config, model, data) if self.outlined else ()), *said):
            self.say(line)
        if data.splits.skipped:
            processes.on_main(lambda: write_text(self.folder / SKIPPED, "\n".join((*data.splits.skipped, ""))))
        self.params_before = sum(parameter.numel() for parameter in model.parameters())
        whole = data if data.vocabulary is None else replace(data, test=held_out(config, data.splits, tokenizer))
        self._score("original", model, tokenizer, whole)
        if data.vocabulary is not None:
            self.text = bytes_of(*self._windows(whole, tokenizer))
        processes.on_main(lambda: self._record(majority=majority_of(config, data.splits)))
        if data.vocabulary is not None:
            self._trim(data.vocabulary, model, data)
        return model, data.tokenizer, data

    def _trim(self, vocabulary: Vocabulary, model: PreTrainedModel, data: RunData) -> None:
        """Takes the words out of the model that do not stay, and records once what that changed."""
        facts = processes.on_main(self._scores).get("vocabulary")
        shapes = load_shapes(self.config.model)
        dtype = weights_dtype(self.config.model, shapes)
        windows = partial(certificate_tokens, data.calibration) if facts is None and processes.is_main() else None
        change = vocabulary.trim(placed(model), windows)
        if facts is None:
            facts = processes.on_main(
                lambda: vocabulary.facts(shapes, dtype, data.splits.test) | {"largest_logit_change": change}
            )
            processes.on_main(lambda: self._record(vocabulary=facts))
        self.say(words_remark(facts))

    def _words_certified(self) -> dict[str, Any]:
        """The certificate's figure of a run with fewer words; none of others."""
        found = processes.on_main(self._scores).get("vocabulary")
        return {} if found is None else {WORDS_CUT: found["largest_logit_change"]}

    def _resolve(self, tokenizer: PreTrainedTokenizerBase, data: RunData) -> tuple[ResolvedConfig, RunData]:
        """Makes the choices that the config leaves open, by the data and by what was measured; the data under these."""
        asked, steps, shapes = self.asked, None, None
        if data.vocabulary is not None:
            shapes = data.vocabulary.shapes(load_shapes(asked.model))
        self.latency = processes.on_main(lambda: measured_target(asked, shapes=shapes))
        found = self.latency  # of the target, as the words that stay count
        if found is None and shapes is not None:
            found = {"target_keep": share_of(asked, shapes)}
        if asked.training.budget:
            self.length = self._measured_length(asked, data, found, shapes)
            steps = None if self.length is None else self.length["steps"]
        config = processes.on_main(lambda: resolve(asked, latency=found, steps=steps))
        if config.evaluation.every != asked.evaluation.every:  # so long a run has a validation split
            kept = None if data.vocabulary is None else data.vocabulary.kept
            data = processes.main_first(lambda: load_data(config, tokenizer, kept))
        return resolve(config, train=data.train), data

    def _measured_length(
        self, asked: ATPConfig, data: RunData, latency: dict[str, Any] | None, shapes: PretrainedConfig | None
    ) -> dict[str, Any] | None:
        (sample, scored), (calibrated, _) = averages(data.train), averages(data.calibration)
        return measured_length(asked, sample, scored, calibrated=calibrated, latency=latency, shapes=shapes)

    def _load(self, config: ATPConfig) -> PreTrainedModel:
        """The model that the run begins with."""
        return load_model(config.model, config.decisions.space)

    def _start(self) -> None:
        """Opens the folder and writes its inputs' fingerprints; on resume compares them, or raises `InputError`."""
        original = self.original(self.inputs)
        if self.resume:
            known = inputs_of(self.folder)
            refuse_other_inputs(known or {}, self.inputs)
            if known is None and self._scores():
                self.say(f"{self.folder / INPUTS} is missing or damaged: scoring anew")
                write_json(self.folder / "evaluation.json", {})
        else:
            self._open.enter_context(opened(self.folder, resume=False))
        write_json(self.folder / INPUTS, self.inputs)
        for name, measured in ((LATENCY, self.latency), (LENGTH, self.length)):
            if measured is not None:
                write_json(self.folder / name, measured)
        if self.vocabulary is not None and written(self.folder / VOCABULARY) is None:
            self.vocabulary.write(self.folder / VOCABULARY)
        if saved_config(self.folder, RESOLVED) is None:
            write_text(self.folder / RESOLVED, self.config.dump())
        if saved_config(self.folder) is None:
            write_text(self.folder / CONFIG, self.asked.dump())
        if original is not None and "original" not in self._scores():
            self._record(original=original)

    def _check_model(self, model: PreTrainedModel) -> None:
        """Raises `InputError` when the model cannot keep what the run promises."""
        check_target(self.config, model.config)
        processes.on_main(lambda: check_given(self.config.decisions, model.config))

    def _tune_dense(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, data: RunData) -> PreTrainedModel:
        self.say("tuning the uncut model with LoRA, for comparison")
        stock = stock_modules(model)
        folder, embeddings = self.folder / DENSE, cast(Parameter, model.get_input_embeddings().weight)
        pretrained = embeddings.data.clone() if self.config.training.embeddings else None
        with make_progress() as display:
            bar = ProgressBar(display, self.config.training.total)
            tuner = LoraTuner(
                self.config, self._adapter_of(model, self.config)(model), data.train, folder,
                validation=data.validation, name=DENSE, callbacks=[bar],
            )  # fmt: skip
            self._hand_over(tuner)
            tuner.train(resume=self.resume)
        if pretrained is not None:
            store_embeddings(tuner.adapted)
        self._score("tuned_dense", tuner.model, tokenizer, data)
        if pretrained is not None:
            embeddings.data = pretrained.to(embeddings.device)
        costs = {"seconds": tuner.clock.seconds[DENSE], "tokens_per_second": tuner.clock.rate(DENSE)}
        processes.on_main(lambda: self._record(**{DENSE: costs}))
        return unload(tuner.adapted, stock)

    def _adapter_of(self, model: PreTrainedModel, config: ATPConfig) -> Callable[[PreTrainedModel], PeftModel]:
        """What puts LoRA on the model and on what is cut from it."""
        space = MaskSpace.from_config(model.config, config.decisions.space)
        return partial(add_lora, space=space, **config.lora.model_dump(), seed=config.seed)

    def _train(self, trainer: ATPTrainer) -> None:
        profiler = Profiler(self.folder / "profile", trainer.phases.of, trainer.phases.total)
        if self.profile:
            trainer.callbacks.append(profiler)
        with make_progress() as display:
            trainer.callbacks.append(ProgressBar(display, trainer.phases.total))
            self._hand_over(trainer)
            trainer.train(resume=self._begun(trainer))
        if profiler.rows:
            self.say(format_table(profiler.rows))

    def _begun(self, trainer: ATPTrainer) -> bool:
        """Whether there is a checkpoint to resume from."""
        return self.resume and processes.on_main(lambda: checkpoints.exist(trainer.checkpoint_root))

    def _hand_over(self, loop: Loop) -> None:
        """Gives a loop the fingerprints of its inputs and the function that prints its messages."""
        loop.inputs, loop.say = self.inputs, self.say

    def _score(self, name: str, model: CausalLM, tokenizer: PreTrainedTokenizerBase, data: RunData) -> None:
        """Scores a model once; the result is kept in evaluation.json. See `_score_once`."""
        self._score_once(name, lambda: model, tokenizer, data)

    def _score_once(
        self, name: str, load: Callable[[], CausalLM], tokenizer: PreTrainedTokenizerBase, data: RunData, **facts: Any
    ) -> None:
        """Scores a model unless its scores, with the same `facts`, are there already.

        The main process does, or all together where the weights are in shards.
        """
        known = processes.on_main(lambda: self._scores().get(name))
        if known is not None and facts.items() <= known.items():
            return
        scores = processes.together(lambda: self._scores_of(name, load(), tokenizer, data)) | facts
        processes.on_main(lambda: self._record(**{name: scores}))

    def _scores_of(
        self, name: str, model: CausalLM, tokenizer: PreTrainedTokenizerBase, data: RunData
    ) -> dict[str, Any]:
        heap.give_back()
        model, settings = placed(model), self.config.evaluation
        windows, count = self._windows(data, tokenizer)
        autocast = autocast_dtype(self.config.training.precision)
        with progress.Bars(transient=True, disable=not processes.is_main()) as display:
            scores = evaluate_model(
                model, tokenizer, windows, data.splits.test,
                tasks=scored_tasks(self.config, data.splits), batch_size=settings.batch_size,
                max_windows=count, max_examples=settings.questions,
                seed=self.config.seed, autocast=autocast,
                progress=bars(display, f"scoring the {name.replace('_', ' ')} model"),
            )  # fmt: skip
        scores |= {"size": model_size(model)}
        if name != "tuned_dense":
            shown = held_out_samples(data.splits.test, settings.samples)
            progress.begin(f"answers of the {name} model")
            scores["samples"] = sample_answers(model, tokenizer, shown, autocast=autocast)
        return scores

    def _windows(self, data: RunData, tokenizer: PreTrainedTokenizerBase) -> tuple[ScoredWindows, int]:
        """The held-out windows, and how many of them are scored: those that hold `text`, where it is known."""
        count = self.config.evaluation.windows
        if self.text is None:
            return packed_windows(data.test, tokenizer, count), count
        windows = packed_windows(data.test, tokenizer)
        return windows, windows_of(windows, self.text, count)

    def _time(self, load: Callable[[], CausalLM]) -> None:
        """Times the original and the final model in turns, unless that is done, so that their ratio is fair."""
        scores = processes.on_main(self._scores)
        names = ("original", "final")
        if all(isinstance(scores[name].get("speed"), dict) for name in names):
            return
        both = (partial(self._load, self.config), load)

        def speeds() -> list[dict[str, float]]:
            heap.give_back()
            progress.begin("speed of the original and the final model")
            try:
                models = [placed(made()) for made in both]
                return throughputs(models, agreed=processes.on_main if processes.sharded() else None)
            except Exception as error:
                # Where processes share weights, all would have to run out of memory together.
                if processes.sharded() or not is_out_of_memory(error):
                    raise
            self.say("there is no memory for the original and the final model at once: timing one after the other")
            heap.give_back()
            return [throughputs([placed(made())])[0] for made in both]

        for name, speed in zip(names, processes.together(speeds), strict=True):
            scores[name]["speed"] = speed
        processes.on_main(lambda: self._record(**scores))

    def _scores(self) -> dict[str, dict[str, Any]]:
        path = self.folder / "evaluation.json"
        scores = read_json(path)
        if scores is None and path.exists():
            self.say(f"{path} is damaged: scoring anew")
            write_json(path, {})
        return {name: values for name, values in (scores or {}).items() if isinstance(values, dict)}

    def _record(self, **values: dict[str, Any]) -> None:
        """Adds to evaluation.json, in the main process."""
        write_json(self.folder / "evaluation.json", self._scores() | values)

    def _conclude(
        self, tokenizer: PreTrainedTokenizerBase, data: RunData, clock: PhaseClock, facts: dict[str, Any]
    ) -> dict[str, Any]:
        """Scores the exported model, writes summary and report, and returns the summary, which includes `facts`."""
        made = self.folder / "model"
        model = {"model_sha256": processes.on_main(lambda: of_model_folder(made))}
        # As the original was scored: in its own dtype.
        load = (lambda: read_sharded(made, "auto", processes.device())) if processes.sharded() else (
            lambda: read_model(made, dtype="auto"))  # fmt: skip
        self._score_once("final", load, tokenizer, data, **model)
        self._time(load)
        return processes.on_main(lambda: self._write_summary(data, clock, facts | model))

    def _write_summary(self, data: RunData, clock: PhaseClock, facts: dict[str, Any]) -> dict[str, Any]:
        progress.begin("report")
        summary = self._summarise(data, clock) | facts
        add_results(self.folder / "model" / "README.md", self.config, summary)
        write_json(self.folder / "summary.json", summary)
        write_report(self.folder)
        return summary

    def _parts(self) -> dict[str, Any]:
        """The parameters of the original and the final model by part; of an unknown family these have other names."""
        found = {"original": load_shapes(self.config.model), "final": read_config(self.folder / "model")}
        if any(family_name(shapes.model_type) not in FAMILIES for shapes in found.values()):
            return {}
        return {"parts": {name: parameters_of(shapes) for name, shapes in found.items()}}

    def _summarise(self, data: RunData, clock: PhaseClock) -> dict[str, Any]:
        scores = self._scores()
        models = [name for name in ("original", "tuned_dense", "final") if name in scores]
        before, after = scores["original"]["size"], scores["final"]["size"]
        rates = {phase: clock.rate(phase) for phase, tokens in clock.tokens.items() if tokens}
        if "dense_lora" in scores:
            rates["dense_lora"] = scores["dense_lora"]["tokens_per_second"]
        dense_seconds = {DENSE: scores[DENSE]["seconds"]} if DENSE in scores else {}
        tasks = scored_tasks(self.config, data.splits)
        beside: dict[str, Any] = {}
        if "tuned_dense" in scores:
            beside = relative_performance(
                scores["final"], scores["tuned_dense"], tasks, scores["majority"], self.config.seed
            )
        elif self.recorded_dense is not None:
            beside["recorded_dense"] = self.recorded_dense
        if self.config.evaluation.answers:
            shown = answered_question({name: scores[name] for name in models}, data.splits.test, tasks)
            beside |= {} if shown is None else {"answers": shown}
        shown_samples = held_out_samples(data.splits.test, self.config.evaluation.samples)
        given = {name: scores[name].get("samples") or [] for name in ("original", "final")}
        if shown_samples and all(len(texts) == len(shown_samples) for texts in given.values()):  # none in old scores
            beside["samples"] = side_by_side(shown_samples, given)
        return {
            "target_keep": self.config.decisions.target_keep,
            "rounding": rounding(self.config, load_shapes(self.config.model)),
            "keep_decoder": after["decoder_params"] / before["decoder_params"] if before["decoder_params"] else 1.0,
            "keep_total": after["params"] / before["params"],
            "params_before": before["params"],
            "params_after": after["params"],
            "megabytes": {"original": before["megabytes"], "final": after["megabytes"]},
            **self._parts(),
            "perplexity": {name: scores[name]["perplexity"] for name in models},
            "perplexity_of": perplexity_of(scores["final"]),
            "perplexity_interval": {name: scores[name]["perplexity_interval"] for name in models},
            **bits_per_byte({name: scores[name] for name in models}),
            "tasks": [task.name for task in tasks],
            **{task.name: {name: without_items(scores[name]["tasks"][task.name]) for name in models} for task in tasks},
            "majority": {name: without_items(found) for name, found in scores["majority"].items()},
            **beside,
            **origins(self.config),
            "license": license_of(self.config),
            "speed": {name: scores[name]["speed"] for name in ("original", "final")},
            "train_tokens": sum(clock.tokens.values()),
            "train_tokens_per_second": rates,
            "seconds": clock.seconds | dense_seconds | {"total": time.perf_counter() - self.started},
            "seed": self.config.seed,
            "data": data.splits.fingerprints | {"description": data.splits.description},
            "versions": versions(),
            "command": self.command,
            **({"vocabulary": scores["vocabulary"]} if "vocabulary" in scores else {}),
        } | ({} if self.latency is None else {"latency": self.latency})
