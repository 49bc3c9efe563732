"""The training loop: what happens around and between the steps of `atp.training.steps`.

It is built on accelerate: device, gradient clipping and trackers are its own.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any, cast

import torch
from accelerate import Accelerator, DistributedType
from accelerate.utils import ProjectConfiguration
from peft import PeftModel
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerBase
from transformers.trainer_utils import align_special_tokens

from atp.config import ATPConfig, ResolvedConfig
from atp.evaluation.inference import CausalLM
from atp.families import FAMILIES, family_name
from atp.ground import heap
from atp.ground.errors import PROCESS_ENDED, InputError, Interrupted, NotReached, is_lost_peer
from atp.ground.signals import SignalGuard
from atp.inputs.precision import autocast_dtype
from atp.inputs.resolve import resolve
from atp.models.attention import use_training_attention
from atp.processes import kernels, processes
from atp.processes.finite import FiniteGuard, refuse_weights
from atp.removal.masters import train_embeddings
from atp.sharding.files import stage
from atp.training import checkpoint as checkpoints
from atp.training.callbacks import Callback, Record, Trackers
from atp.training.checkpoint import Checkpoint, prefixed, resume_point
from atp.training.cross_entropy import held_heads
from atp.training.cuda_graphs import CudaGraphs, GraphedDecoder, refused
from atp.training.data import Batch, step_batches
from atp.training.exchange import Exchange
from atp.training.flat import CASTS_ON, FlatParameters, NarrowFactors
from atp.training.loss import causal_lm_loss, causal_of
from atp.training.metrics import MetricsLog, PhaseClock
from atp.training.offload import Offload, recompute_layers
from atp.training.optimizer import CLIPS, adamw
from atp.training.prometheus import MetricsFile
from atp.training.resume import begun, fingerprints, refuse_other_inputs
from atp.training.schedule import Phases, full_rate, learning_rate
from atp.training.validation import Validation

_UNMASKED = ("open", "tune")  # phases whose steps compute the same each time
_WHOLE = (DistributedType.NO, DistributedType.MULTI_CPU, DistributedType.MULTI_GPU)


class Loop:
    """What every run shares: optimizer, samples, precision, guards, records, signals and checkpoints.

    Trains the adapter of a PEFT model for `phases.total` steps, with `training.embeddings` its embeddings too, and all
    of a plain model. folder holds metrics.jsonl and checkpoints/.
    train_dataset yields dictionaries with `input_ids` and `labels` int64 [length], as the datasets of `atp.data` do;
    so does validation, which `evaluation.every` needs.
    Subclasses extend `check`, `record` and `checkpoint`. Raises `InputError` for weights that are not finite.
    """

    def __init__(
        self,
        config: ATPConfig,
        model: PeftModel,
        train_dataset: Dataset,
        folder: Path,
        phases: Phases,
        *,
        validation: Dataset | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        callbacks: Sequence[Callback] = (),
    ) -> None:
        processes.start(config.training.sharding, config.model_dump())
        kernels.check_once()
        refuse_weights(model)
        self.train_dataset, self.phases, self.tokenizer = train_dataset, phases, tokenizer
        self.batches_per_step = config.training.gradient_accumulation * processes.count()  # of all processes
        if not isinstance(config, ResolvedConfig):
            config = processes.on_main(lambda: begun(config) or resolve(config))
        self.config = resolve(config, train=train_dataset)
        self.offload = Offload(folder if config.training.offload else None)
        trackers = [name for name in config.training.report_to if name != "none"]
        told = [MetricsFile(config.training.metrics_file)] if config.training.metrics_file else []
        self.callbacks = [*callbacks, *([Trackers()] if trackers else []), *told]
        self.step, self.phase = 0, ""  # finished LoRA steps, and what they are part of
        self.checkpoint_root = folder / "checkpoints"
        self.metrics, self.clock = MetricsLog(folder / "metrics.jsonl"), PhaseClock()
        self.finite = FiniteGuard(config.training.max_bad_steps)
        self.signals = SignalGuard()
        self.inputs: dict[str, str] | None = None  # fingerprints of what is trained from; taken in `train` if not given
        self.say: Callable[[str], None] = print if processes.is_main() else lambda line: None
        self.autocast_dtype = autocast_dtype(self.config.training.precision)
        self.validation = Validation(self.config, validation, self.autocast_dtype, tokenizer)
        self.accelerator = Accelerator(
            cpu=processes.device().type == "cpu",
            mixed_precision="no",  # `loss` enters autocast itself: accelerate would cast the logits to float32
            log_with=trackers or None,
            project_config=ProjectConfiguration(str(folder), logging_dir=str(folder / "trackers")),
        )
        if self.accelerator.distributed_type not in _WHOLE:
            raise InputError(f"{self.accelerator.distributed_type.value} {processes.NO_SHARDS}")
        self._batches: Iterator[list[Batch]] | None = None
        self._decode: GraphedDecoder | None = None
        self._narrow: NarrowFactors | None = None
        self.bind(model)

    def bind(self, model: CausalLM) -> None:
        """Makes a model the one that is trained, with an optimizer made anew around its parameters."""
        if self.tokenizer is not None:
            align_special_tokens(model, self.tokenizer)  # the exported config names the tokenizer's pad token
        base = causal_of(model)
        if family_name(base.config.model_type) in FAMILIES:  # others may do more in attention than ours knows of
            use_training_attention(base)
        if self.config.training.embeddings and isinstance(model, PeftModel):
            train_embeddings(model)
        if self.config.training.gradient_checkpointing:
            recompute_layers(model)
        shared = heap.addresses(getattr(self, "model", None))
        self.model: CausalLM = cast(Any, model).to(self.device)
        heap.move_from(self.model, shared)
        trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        beside = {} if self.trains_all else {name: p for name, p in trained.items() if ".lora_" not in name}
        self.trained = FlatParameters({name: p for name, p in trained.items() if name not in beside})
        self.beside = FlatParameters(beside) if beside else None
        self.adamw = adamw(self.trained, self.config.training, self.beside)
        self.accelerator.free_memory()  # of the model before this one, which nothing refers to any more
        self.optimizer = self.accelerator.prepare(self.adamw)
        self.exchange = Exchange(trained.values())
        self._reset_loss()

    @property
    def trains_all(self) -> bool:
        """Whether all weights are trained, and no adapter."""
        return not isinstance(self.model, PeftModel)

    @property
    def adapted(self) -> PeftModel:
        """The model, while it has an adapter."""
        assert isinstance(self.model, PeftModel), "all weights are trained, and no adapter"
        return self.model

    @property
    def flats(self) -> list[FlatParameters]:
        """What is trained: the adapter or all weights, and what has a rate of its own beside it."""
        return [self.trained] if self.beside is None else [self.trained, self.beside]

    @property
    def device(self) -> torch.device:
        """Where the model trains."""
        return self.accelerator.device

    # Parts of a step

    def scored_tokens(self, batches: list[Batch]) -> Tensor:
        """Tokens that the loss of a step averages over, in all its batches and processes, scalar float32."""
        count = sum(len(batch["targets"]) for batch in batches)
        # Filled on the device and reduced there: the host waits for nothing.
        return self.accelerator.reduce(torch.full((), float(count), device=self.device), "sum")

    def accumulate(self, batches: list[Batch]) -> Iterator[Batch]:
        """The batches one by one; processes exchange gradients in the backward pass of the last."""
        yield from batches[:-1]
        with self.exchange.during_backward():
            yield batches[-1]

    def loss(self, batch: Batch, tokens: Tensor) -> Tensor:
        """A batch's share of the step's mean cross-entropy per token, scalar float32. tokens: `scored_tokens`."""
        with self.autocast(), self.offload.saving(self.model):
            loss = causal_lm_loss(self.model, batch, tokens, decode=self._decode)
        loss = loss * self.accelerator.num_processes  # gradients become the mean over processes, `tokens` is their sum
        self._loss += loss.detach()
        return loss

    def autocast(self) -> AbstractContextManager[Any]:
        """The precision of forward passes."""
        return torch.autocast(self.device.type, dtype=self.autocast_dtype, enabled=self.autocast_dtype is not None)

    def backward(self, loss: Tensor) -> None:
        """Adds to the gradients of what is trained."""
        self.accelerator.backward(loss)
        if self._narrow is not None:
            self._narrow.collect()

    def clip(self) -> None:
        """Clips the gradient of the loss to norm `training.clip`."""
        self.accelerator.clip_grad_norm_([flat.flat for flat in self.flats], self.config.training.clip)

    def skip_if_not_finite(self, beside: Sequence[nn.Parameter] = ()) -> Tensor:
        """Makes the next optimizer step change nothing if a gradient is not finite.

        beside: parameters whose gradients count too, though another optimizer steps them. Returns 1 for a step that
        will be skipped and 0 otherwise, scalar float32 on the device.
        """
        return self.finite.check(self.adamw, self.step + 1, beside).float()

    # Between steps

    def begin(self, phase: str) -> None:
        """Names the phase under way and tells callbacks, once per phase."""
        if self.phase != phase:
            heap.give_back()  # what the phase before has left
            self.phase = phase
            self._tell("on_phase")

    @held_heads()
    def run(self, phase: str, step: Callable[[list[Batch]], None], until: int) -> None:
        """Trains until `until` steps are done. phase: the name in records and callbacks.

        Raises `Interrupted` after a signal, with a checkpoint written. Only before the cut there is none: the caller
        cuts, which writes it, and calls `end_on_signal`.
        """
        if self.step >= until:
            return
        self.model.train()
        if self._batches is None:
            self._batches = self.batches_from(self.step)
        self.begin(phase)
        with self._graphed(phase), self._cast_at_once():
            self._run(phase, step, until)

    @contextmanager
    def _cast_at_once(self) -> Iterator[None]:
        """Steps inside the with block cast all factors at once; those of several processes exchange gradients apart."""
        dtype = self.autocast_dtype
        alone = processes.count() == 1 and self._decode is None and not self.trains_all
        if dtype is None or self.device.type not in CASTS_ON or not alone:
            yield
            return
        self._narrow = NarrowFactors(self.trained, self.model.modules(), dtype)
        try:
            with self._narrow.read():
                yield
        finally:
            self._narrow = None

    @contextmanager
    def _graphed(self, phase: str) -> Iterator[None]:
        """Steps inside the with block replay CUDA graphs where the config wants them and nothing is in the way."""
        if not self.config.training.cuda_graphs or phase not in _UNMASKED:
            yield
            return
        why = refused(self)
        if why is not None:
            self.say(f"training.cuda_graphs: {phase} steps run without them, because {why}")
        else:
            self._decode = GraphedDecoder(list(self.trained.parameters.values()), CudaGraphs())
        try:
            yield
        finally:
            self._decode = None

    def _run(self, phase: str, step: Callable[[list[Batch]], None], until: int) -> None:
        assert self._batches is not None
        while self.step < until and not self.validation.exhausted:
            started = time.perf_counter()
            batches = next(self._batches)
            rate = self._set_learning_rate()
            step(batches)
            for flat in self.flats:
                flat.zero_grad()
            if self._narrow is not None:
                self._narrow.refresh()
            self.step += 1
            stopping = self._heard_signal()
            tokens = sum(batch["tokens"] for batch in batches) * processes.count()
            self.clock.add(phase, time.perf_counter() - started, tokens)
            record = self._log(rate) if self.step % self.config.training.log_every == 0 else None
            if self.validation.due(self.step, self.phases.total):
                loss = self.validate()
                self.metrics.write({"step": self.step, "phase": phase, **self.validation.figures(loss)})
            self._tell("on_step", record)
            if self.step == self.phases.cut_step:
                continue
            ending = self.step == self.phases.total or self.validation.exhausted
            if stopping or ending or self.step % self.config.training.save_every == 0:
                self.check()
                self.write(self.checkpoint())
            if stopping:
                self.end_on_signal()
        if self.step in (self.phases.cut_step, self.phases.total):
            self.check()

    def validate(self) -> float:
        """Scores the model as it is on the validation split: nats per token."""
        with self.clock.timed("validation"), self.as_scored():
            loss = self.validation.measure(self.model, self.device)
        if self.final_shape:
            self.validation.compare(self.step, loss, self._adapter())
        return loss

    def as_scored(self) -> AbstractContextManager[Any]:
        """What is in force beside the weights while the model is scored."""
        return nullcontext()

    @property
    def final_shape(self) -> bool:
        """Whether the model has the shapes that it will be exported with."""
        return True

    def take_best(self) -> None:
        """Ends the run with the weights of the best validation score, if `training.keep_best` is set."""
        if self.validation.adapter:
            self._set_adapter(self.validation.adapter)

    @contextmanager
    def session(self) -> Iterator[None]:
        """Around a whole training: signals are noted, and callbacks hear of the end however it comes.

        Raises `NotReached` where another process has ended; `Interrupted` where both heard a signal, and that one,
        which was not training yet, ended at once.
        """
        with self.signals:
            try:
                yield
            except RuntimeError as error:
                if processes.count() == 1 or not is_lost_peer(error):
                    raise
                if self.signals.received is not None:
                    raise Interrupted(self.signals.received, "continue with --resume") from error
                raise NotReached(PROCESS_ENDED) from error
            finally:
                self._tell("on_end")

    def end_on_signal(self) -> None:
        """Raises `Interrupted` if one of the processes got a signal; a checkpoint is written by then."""
        if self._heard_signal() and self.signals.received is not None:
            newest = processes.on_main(lambda: checkpoints.newest(self.checkpoint_root))
            raise Interrupted(self.signals.received, f"continue with --resume (checkpoint {newest})")

    def check(self) -> None:
        """Raises `NotReached` for too many non-finite steps: at each record, each checkpoint, the cut and the end."""
        done, cut = self.step, self.phases.cut_step
        if done in (cut, self.phases.total):
            self.finite.finish(done if done <= cut else done - cut)
        self.finite.report()

    def record(self) -> Record:
        """What a record holds besides the figures of every run."""
        return {}

    def _log(self, rate: float) -> Record:
        self.check()
        loss = processes.mean(float(self._loss)) / (self.step - self._logged_at)
        self._reset_loss()
        record = {"step": self.step, "phase": self.phase, "loss": loss, **self.record(), "lr": rate}
        record |= self.clock.record(self.phase) | {"seconds": sum(self.clock.seconds.values())}
        self.metrics.write(record)
        return record

    def _reset_loss(self) -> None:
        self._loss, self._logged_at = torch.zeros((), device=self.device), self.step

    def _set_learning_rate(self) -> float:
        training = self.config.training
        rate = full_rate(training, self.step) if self.trains_all else learning_rate(training, self.step)
        rates = (rate, training.embeddings_rate(rate))
        for group, own in zip(self.adamw.param_groups, rates, strict=False):
            group["lr"], group[CLIPS] = own, bool(training.update_clipping)
        return rate

    def _heard_signal(self) -> bool:
        """Whether any process got a signal: all must stop after the same step, and one alone may hear of it."""
        self.signals.received = processes.largest(self.signals.received or 0) or None
        return self.signals.received is not None

    def batches_from(self, step: int) -> Iterator[list[Batch]]:
        """What this process trains on from a step on, a list of batches per step."""
        training = self.config.training
        return step_batches(
            self.train_dataset, step, self.phases.total, size=training.batch_size,
            accumulation=self.batches_per_step // processes.count(), seed=self.config.seed, device=self.device,
        )  # fmt: skip

    def _tell(self, event: str, *arguments: Any) -> None:
        for callback in self.callbacks:
            getattr(callback, event)(self, *arguments)

    # Checkpoints

    def samples(self) -> dict[str, Dataset]:
        """The data sets that training reads, by split."""
        validation = {} if self.validation.dataset is None else {"validation": self.validation.dataset}
        return {"train": self.train_dataset, **validation}

    def resume_point(self, resume: bool) -> Path | None:
        """The checkpoint that training continues from, None for a start from step 0; says what is not as expected.

        Raises `InputError` when there are checkpoints and none is intact.
        """
        if self.inputs is None:
            self.inputs = fingerprints(self.model, self.tokenizer, **self.samples())
        path = processes.on_main(lambda: resume_point(self.checkpoint_root, self.say)) if resume else None
        if path is None:
            self.metrics.rewind(0)
        return path

    def checkpoint(self) -> Checkpoint:
        """Everything that the next step depends on."""
        tensors = prefixed("model", self._adapter()) | prefixed("best", self.validation.adapter)
        for flat in self.flats:
            tensors |= prefixed("lora_optimizer", flat.state_of(self.adamw))
        tensors["rng.cpu"] = torch.get_rng_state()
        if self.device.type == "cuda":
            tensors["rng.cuda"] = torch.cuda.get_rng_state(self.device)
        meta = {
            "config": self.config.model_dump(mode="json"),
            "clock": self.clock.state(),
            "finite": self.finite.state(),
            "validation": self.validation.state(),
            "batches_per_step": self.batches_per_step,
            "inputs": self.inputs,
        }
        return Checkpoint(self.step, tensors, meta)

    def _adapter(self) -> dict[str, Tensor]:
        """What is trained, by name."""
        return {name: parameter for flat in self.flats for name, parameter in flat.parameters.items()}

    def _set_adapter(self, adapter: dict[str, Tensor]) -> None:
        with torch.no_grad():
            for name, parameter in self._adapter().items():
                parameter.copy_(adapter[name])

    def write(self, state: Checkpoint) -> Path:
        """Writes a checkpoint, in the main process, and tells callbacks of it."""
        keep = self.config.training.keep_checkpoints
        staged = stage(self.checkpoint_root, state.shards) if state.shards else None
        path = processes.on_main(lambda: checkpoints.save(self.checkpoint_root, state, keep=keep, staged=staged))
        self._tell("on_checkpoint", path)
        return path

    def refuse_other_run(self, state: Checkpoint) -> None:
        """Raises `InputError` for a checkpoint of another config or inputs, or of steps that cannot be shared here."""
        self.config.refuse_change_of(state.meta["config"])
        self.batches_per_step = state.meta["batches_per_step"]
        if self.batches_per_step % processes.count():
            raise InputError(
                f"a step of this run reads {self.batches_per_step} batches, which {processes.count()} processes cannot "
                "share equally: resume it in a number of processes that divides them"
            )
        refuse_other_inputs(state.meta.get("inputs") or {}, self.inputs or {})

    def load(self, state: Checkpoint) -> None:
        """Continues from a checkpoint of this run; the model must have its shapes already."""
        self.step = state.step
        self.clock.load(state.meta["clock"])
        self.finite.restore(state.meta["finite"])
        damaged = self.metrics.rewind(state.step)
        if damaged:
            self.say(f"{self.metrics.path}: {damaged} damaged line(s) left out")
        self._set_adapter(state.part("model"))
        self.validation.load(state.meta["validation"], state.part("best"))
        for flat in self.flats:
            flat.load_state(self.adamw, state.part("lora_optimizer"))
        self._reset_loss()
        self._batches = self.batches_from(self.step)
        # Last: all of the above may draw random numbers.
        rng = state.part("rng")
        torch.set_rng_state(rng["cpu"])
        if "cuda" in rng:
            torch.cuda.set_rng_state(rng["cuda"], self.device)
