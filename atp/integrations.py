"""All phases before the cut inside somebody else's training loop: a callback for `transformers.Trainer` and subclasses.

    callback = ATPCallback(calibration, open=200, decisions={"target_keep": 0.6})
    trainer = SFTTrainer(model, args, train_dataset=data, peft_config=lora, callbacks=[callback])  # lora on all linears
    trainer.train()
    smaller = callback.cut(trainer.model)  # then tune on, for twice the steps: that is what `atp train` does by default

The callback calls the same parts of a step as `atp.training.loop`, in the same order.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager, ExitStack, nullcontext
from typing import Any, cast

import torch
from peft import LoraConfig, PeftModel
from peft.tuners.lora import Linear as PeftLinear
from torch import Tensor, nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from atp.config import ATPConfig
from atp.data import PackedDataset, Pieces, RaggedDataset
from atp.data.batches import IGNORE
from atp.families import EXPERTS, family_of, is_cut
from atp.ground.errors import InputError
from atp.inputs.resolve import resolve
from atp.lora.experts import STACKED
from atp.lora.layer import ADAPTER, MaskedPeftLinear, fuse_layers
from atp.processes import kernels, processes
from atp.processes.finite import FiniteGuard
from atp.spaces.space import MaskSpace
from atp.training.pruning import Pruning
from atp.training.schedule import Phases

_ON_EXPERTS = [f"{EXPERTS}.{name}" for name in STACKED]


class ATPCallback(TrainerCallback):
    """Adds decisions to a Trainer that tunes plain LoRA; `cut` then returns the smaller model.

    Training stops after open + search + settle optimizer steps. `cut` certifies that it changes no logits; tune on with
    a new Trainer around its result, or around `atp.removal.merge_adapter` of it, a plain model, to tune all weights.
    Loss, data, batch size, gradient accumulation, learning rate, clipping and what is trained are the Trainer's. An
    evaluation in between sees the unmasked model.

    The hooks of transformers suffice. `on_pre_optimizer_step` comes after clipping, where the lasso's gradient belongs.
    Masks stay on the layers from `on_step_begin` to `on_pre_optimizer_step`, so that activation checkpointing reruns
    what it ran; between the batches of a step (`on_substep_end`) regularizer l0 draws new gates. A step with a
    non-finite gradient is skipped by torch's fused optimizers only, so `optim` must be one, which is the default.
    """

    def __init__(
        self,
        calibration: Iterable[Mapping[str, Any]],
        *,
        open: int = 0,
        search: int = 0,
        settle: int = 0,
        decisions: Mapping[str, Any] | None = None,
        regularizer: str = "lasso",
        beta: float = 0.3,
        settle_beta: float = 100.0,
        max_bad_steps: int = 5,
        seed: int = 0,
    ) -> None:
        """calibration: rows with `input_ids` and, if not every token counts, `labels` (-100 for those that do not).

        open, search, settle: optimizer steps of these phases, of which one must have some. decisions: keys of
        `atp.config.DecisionsConfig`. The rest is as in `atp.config.TrainingConfig`. Raises `InputError` for what cannot
        be used.
        """
        if open + search + settle < 1:
            raise InputError("ATPCallback has no step to decide in: set open, or search, or settle")
        training = {
            "open": open, "search": search, "settle": settle, "tune": 0, "regularizer": regularizer,
            "beta": beta, "settle_beta": settle_beta, "max_bad_steps": max_bad_steps,
        }  # fmt: skip
        # Model and folder are the Trainer's.
        unused = {"model": {"path": "trainer"}, "output_dir": "trainer"}
        self.config = ATPConfig.parse(unused | {"seed": seed, "decisions": dict(decisions or {}), "training": training})
        self.phases = Phases.from_config(self.config.training)
        self.calibration = _windows(calibration)
        self.finite = FiniteGuard(max_bad_steps)
        self.pruning: Pruning | None = None
        self._masks = ExitStack()
        self._skip: Tensor | None = None
        self._done = 0

    @property
    def certificate(self) -> dict[str, Any]:
        """What freeze and cut were measured to change, as far as they have come."""
        return self.pruning.certificate if self.pruning else {}

    def cut(self, model: nn.Module) -> PeftModel:
        """The smaller model with its adapter, measured to give the same logits; the uncut one is spent.

        model: `trainer.model` after training. Raises `InputError` before the last of its steps, and `NotReached` if the
        cut changes the logits.
        """
        if self.pruning is None or self._done < self.phases.cut_step:
            raise InputError(
                f"the model can be cut after the {self.phases.cut_step} steps of its phases and has trained "
                f"{self._done}: call trainer.train() to its end first"
            )
        if self.pruning.is_cut or getattr(model, "module", model) is not self.pruning.model:
            raise InputError("callback.cut takes the model that this callback trained with, once: pass trainer.model")
        self.finite.report()
        if not self.pruning.decisions.frozen:
            self._freeze(self.pruning)
            self.pruning.shrink(steps_left=0)
        return self.pruning.cut(swap=lambda smaller: None)

    # Hooks, in the order in which a Trainer calls them

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        model = kwargs["model"]
        _check_arguments(args, state, self.phases.cut_step)
        _check_optimizer(_unwrapped(kwargs["optimizer"]))
        processes.start()
        kernels.check_once()
        if processes.sharded():
            raise InputError(f"FSDP {processes.NO_SHARDS}")
        space = MaskSpace.from_config(model.config, self.config.decisions.space)
        _take_masks(model, space)
        model.train()
        config = resolve(_as_trained(self.config, args, model), shapes=model.config)
        self.pruning = Pruning(
            model, space, self.calibration, config.decisions, config.training, seed=config.seed,
            autocast=torch.bfloat16 if args.bf16 else None,
        )  # fmt: skip
        if config.decisions.source == "static":
            self.pruning.start()

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        pruning, phase = self._pruning(), self._phase(state)
        if phase == "search":
            if not pruning.scored:
                pruning.start()
            pruning.decide(state.global_step - self.phases.open)
        elif phase == "settle" and not pruning.decisions.frozen:
            self._freeze(pruning)
        self._masks.enter_context(self._around_batch(state))

    def on_substep_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._masks.close()
        self._masks.enter_context(self._around_batch(state))

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._masks.close()
        pruning, optimizer = self._pruning(), _unwrapped(kwargs["optimizer"])
        decided = self._phase(state) != "open"
        if decided:
            pruning.regularize(self._weight(state))
        bad = self.finite.check(
            optimizer, state.global_step + 1, pruning.uncut.regularizer.parameters if decided else ()
        )
        self._skip = bad.float()

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self._phase(state) == "open":
            return
        pruning = self._pruning()
        assert self._skip is not None
        pruning.after_step(self._weight(state), self._skip)
        if self._phase(state) == "settle":
            pruning.shrink(steps_left=self.phases.cut_step - state.global_step)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._done = state.global_step
        if self._done == self.phases.cut_step:
            control.should_training_stop = True

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.finite.report()
        self._pruning().decisions.finite.report()

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._masks.close()

    def _freeze(self, pruning: Pruning) -> None:
        """What lies between the last step of open or search and the first of settle."""
        if not pruning.scored:
            pruning.start()
        pruning.judge_in_rounds(lambda part: nullcontext())
        pruning.freeze()
        if self.config.decisions.refit_windows:
            pruning.refit()

    def _around_batch(self, state: TrainerState) -> AbstractContextManager[None]:
        return self._pruning().open() if self._phase(state) == "open" else self._pruning().masked()

    def _pruning(self) -> Pruning:
        if self.pruning is None:
            raise InputError("ATPCallback must be there when training begins: pass it to the Trainer's constructor")
        return self.pruning

    def _phase(self, state: TrainerState) -> str:
        return self.phases.of(state.global_step)

    def _weight(self, state: TrainerState) -> float:
        training = self.config.training
        return training.beta if self._phase(state) == "search" else training.settle_beta


def _windows(calibration: Any) -> PackedDataset | RaggedDataset | Pieces:
    """Calibration rows as one of our own data sets, without those that have no loss."""
    if isinstance(calibration, PackedDataset | RaggedDataset | Pieces):
        return calibration
    sized = hasattr(calibration, "__len__")
    rows = [calibration[index] for index in range(len(calibration))] if sized else list(calibration)
    if not rows:
        raise InputError("ATPCallback needs calibration data and got no row: pass some tokenized windows")
    if "input_ids" not in rows[0]:
        raise InputError(
            f"calibration rows have {', '.join(map(str, rows[0]))} and no input_ids: tokenize them, for example with "
            "atp.data.pack"
        )
    pairs = [(row["input_ids"], row.get("labels", row["input_ids"])) for row in rows]
    documents = [(torch.as_tensor(ids).tolist(), torch.as_tensor(labels).tolist()) for ids, labels in pairs]
    documents = [document for document in documents if any(label != IGNORE for label in document[1][1:])]
    if not documents:
        raise InputError("no calibration row has a token with a loss: give some of them labels other than -100")
    if len({len(ids) for ids, _ in documents}) > 1:
        return RaggedDataset(documents)
    input_ids, labels = (torch.tensor(column) for column in zip(*documents, strict=True))
    return PackedDataset(input_ids, labels)


def _as_trained(config: ATPConfig, args: TrainingArguments, model: PeftModel) -> ATPConfig:
    """With what the Trainer and the adapter set, by which the source of decisions is chosen where it is not given."""
    size, accumulation = args.per_device_train_batch_size, args.gradient_accumulation_steps
    training = config.training.model_copy(update={"batch_size": size, "gradient_accumulation": accumulation})
    adapter = cast(LoraConfig, model.peft_config[ADAPTER])  # as `_take_masks` has made sure
    lora = config.lora.model_copy(update={"dropout": adapter.lora_dropout})
    return config.model_copy(update={"training": training, "lora": lora})


def _check_arguments(args: TrainingArguments, state: TrainerState, steps: int) -> None:
    if state.global_step:
        raise InputError("a Trainer's checkpoint holds no decisions: start ATPCallback's training from step 0")
    if state.max_steps < steps:
        raise InputError(f"the phases take {steps} steps and the Trainer makes {state.max_steps}: set max_steps")
    if args.fsdp or args.deepspeed:
        raise InputError(f"{'FSDP' if args.fsdp else 'DeepSpeed'} {processes.NO_SHARDS}")
    if args.n_gpu > 1:
        raise InputError(f"{args.n_gpu} GPUs in one process share their layers' masks: start one process per GPU")
    if args.fp16:
        raise InputError("fp16 scales gradients, to which the regularizer then adds too little: set bf16 instead")


def _check_optimizer(optimizer: torch.optim.Optimizer) -> None:
    if not all(group.get("fused") for group in optimizer.param_groups):
        raise InputError("ATPCallback skips non-finite steps by torch's fused optimizers: set optim=adamw_torch_fused")


def _unwrapped(optimizer: Any) -> torch.optim.Optimizer:
    return getattr(optimizer, "optimizer", optimizer)  # accelerate's wrapper


def _take_masks(model: nn.Module, space: MaskSpace) -> None:
    """Makes the LoRA layers of the space know masks, in place: the optimizer holds their parameters already."""
    if not isinstance(model, PeftModel):
        raise InputError("ATPCallback needs a model with a LoRA adapter: wrap it with peft.get_peft_model first")
    fused = () if is_cut(model.config) else family_of(model.config).fused
    if fused:
        raise InputError(
            f"this model holds projections in one linear ({', '.join(fused)}): before the adapter is made, split them "
            "with atp.models.fused.split_projections(model)"
        )
    config = model.peft_config.get(ADAPTER)
    if not isinstance(config, LoraConfig) or len(model.peft_config) > 1:
        raise InputError(f"ATPCallback needs one LoRA adapter named '{ADAPTER}', not {', '.join(model.peft_config)}")
    if config.use_dora or config.lora_bias or config.modules_to_save or config.bias != "none":
        raise InputError("ATPCallback needs plain LoRA, without use_dora, lora_bias, bias and modules_to_save")
    config._register_custom_module({nn.Linear: MaskedPeftLinear})  # so that the cut model has the same layers
    layers = range(space.num_layers)
    names = {f"layers.{layer}.{name}" for layer in layers for name, own in space.present(layer).items() if own.lora}
    found = {name[name.index("layers.") :]: m for name, m in model.named_modules() if isinstance(m, PeftLinear)}
    remedy = "make the adapter with target_modules='all-linear'"
    if EXPERTS in space.modules:  # PEFT's all-linear is on routers too
        modules = sorted(name.rpartition(".")[2] for name in space.adapted)
        remedy = f"make the adapter with target_modules={modules}, for experts with target_parameters={_ON_EXPERTS}"
    on_experts = {name.rpartition(".")[2] for name in config.target_parameters or ()}
    if on_experts not in (set(), {*STACKED} if EXPERTS in space.modules else set()):
        raise InputError(
            f"LoRA is on the parameters {', '.join(sorted(cast(Any, config.target_parameters)))}, of which ATPCallback "
            f"takes those of all experts or none: {remedy}"
        )
    if found.keys() != names:
        raise InputError(
            f"LoRA is on {len(found)} linears, {len(names & found.keys())} of the {len(names)} that decisions remove "
            f"from: {remedy}"
        )
    for layer in found.values():
        if type(layer) is PeftLinear:
            MaskedPeftLinear.adopt(layer)
    fuse_layers(model)
