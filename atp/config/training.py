"""The section `training` of the configuration."""

from __future__ import annotations

import math
from typing import Literal

from pydantic import Field, model_validator

from atp.config.section import Section
from atp.ground.errors import InputError

_OPEN_SHARE = 1 / 3  # of the steps (dev/LOG.md)
_HALF_LIVES, _LONGEST_BETA2 = 6, 0.999
_HIGHEST_RATE = 2e-3
FULL_LR = 2e-4  # AdamW's for models of some hundred million parameters, all of them trained
_EMBEDDINGS_SHARE = 0.1  # of the rate of LoRA, whose factors start at zero
ENOUGH_SCORED = 32  # tokens with a loss in a step, for the highest rate (dev/LOG.md)


class TrainingConfig(Section):
    """Phases in LoRA steps, optimizer and bookkeeping."""

    steps: int = Field(
        400, ge=1, description="LoRA steps of the whole run, unless tune is set: then the phases add up."
    )
    minutes: float | None = Field(
        None, gt=0, description="Training time in minutes on this device, in place of steps (docs/plan.md)."
    )
    tokens: float | None = Field(None, gt=0, description="Training tokens of all LoRA steps, in place of steps.")
    open: int | None = Field(
        None,
        ge=0,
        description="Steps of the open phase, with all structures in place; null: a third, or 0 with tune set.",
    )
    search: int = Field(0, ge=0, description="Steps of the search phase, in which decisions move.")
    settle: int = Field(
        0, ge=0, description="Steps of the settle phase, in which LoRA of removed structures shrinks to zero."
    )
    tune: int | None = Field(
        None, ge=0, description="Steps of the tune phase, after the cut; null: what the other phases leave of steps."
    )
    batch_size: int = Field(1, ge=1, description="Samples per batch and process.")
    gradient_accumulation: int = Field(1, ge=1, description="Batches per step and process.")
    lr: float | None = Field(
        None, gt=0, description="Peak learning rate; null: 2e-3, or less for few tokens with a loss per step."
    )
    after_cut: Literal["lora", "full"] = Field(
        "lora", description="Weights that are tuned after the cut: those of LoRA, or all of the smaller model."
    )
    full_lr: float | None = Field(
        None, gt=0, description="Peak learning rate of after_cut: full, which warms up again; null: 2e-4."
    )
    embeddings: bool = Field(
        False, description="Whether to tune the input embeddings, and a head tied to them, beside LoRA."
    )
    embeddings_lr: float | None = Field(
        None, gt=0, description="Peak learning rate of the embeddings; null: a tenth of lr."
    )
    beta2: float | None = Field(
        None,
        ge=0,
        lt=1,
        description="Decay of AdamW's second moment per step; null: a half-life of a sixth of the run.",
    )
    update_clipping: bool | None = Field(
        None,
        description="Smaller steps for gradients larger than usual; null: only with few tokens with a loss per step.",
    )
    schedule: Literal["constant", "linear", "cosine"] = Field("cosine", description="Schedule of the learning rate.")
    warmup: int = Field(10, ge=0, description="Warm-up steps of the learning rate.")
    clip: float = Field(1.0, gt=0, description="Largest gradient norm.")
    regularizer: Literal["lasso", "l0"] = Field(
        "lasso", description="Regularizer that drives LoRA of removed structures to zero."
    )
    beta: float = Field(0.3, ge=0, description="Weight of the regularizer during search.")
    settle_beta: float = Field(100.0, ge=0, description="Weight of the regularizer during settle.")
    precision: Literal["auto", "float32", "bfloat16"] = Field(
        "auto", description="Dtype of matrix products; auto: bfloat16 if the device has instructions for it."
    )
    gradient_checkpointing: bool = Field(
        False, description="Recomputation of activations in the backward pass, to save memory."
    )
    offload: bool = Field(
        False, description="Offload of activations and of what the refit reads to host memory; on a CPU, to a file."
    )
    cuda_graphs: bool = Field(
        False, description="CUDA graphs of open and tune steps on a GPU, for batches of a shape that comes again."
    )
    sharding: Literal["fsdp"] | None = Field(
        None,
        description="Sharding of the frozen weights over processes (docs/scale.md); null: every process holds all.",
    )
    save_every: int = Field(50, ge=1, description="Steps between checkpoints.")
    keep_checkpoints: int = Field(2, ge=1, description="Number of newest checkpoints to keep.")
    log_every: int = Field(1, ge=1, description="Steps between log records.")
    report_to: list[str] = Field(default_factory=list, description="Experiment trackers, such as tensorboard or wandb.")
    keep_best: bool = Field(
        False, description="Whether to end with the weights of the best validation score since the cut."
    )
    patience: int | None = Field(
        None, ge=1, description="Validation scores without improvement before training stops; null: no early stop."
    )
    metrics_file: str | None = Field(None, description="Prometheus text file of the run's state (docs/operate.md).")
    max_bad_steps: int = Field(5, ge=1, description="Consecutive non-finite steps before the run stops.")

    @property
    def budget(self) -> dict[str, float]:
        """The length of the run where it is no number of steps: `minutes` or `tokens`, or nothing."""
        return {key: value for key in ("minutes", "tokens") if (value := getattr(self, key)) is not None}

    def require_steps(self) -> None:
        """Raises `InputError` for minutes or tokens, where nobody turns them into steps (`atp.plan.length`)."""
        for key in self.budget:
            raise InputError(
                f"training.{key} is turned into steps by `atp train` and `atp plan` only: give here training.steps, "
                "the number that `atp plan` says it comes to"
            )

    @property
    def opened(self) -> int:
        """LoRA steps of the open phase."""
        if self.open is None:
            return 0 if self.tune is not None else round(_OPEN_SHARE * self.steps)
        return self.open

    @property
    def opened_samples(self) -> int:
        """Training samples that a process reads in the open phase, repeated ones too."""
        return self.opened * self.gradient_accumulation * self.batch_size

    @property
    def total(self) -> int:
        """LoRA steps in the whole run."""
        before = self.opened + self.search + self.settle
        return self.steps if self.tune is None else before + self.tune

    @property
    def second_moment(self) -> float:
        """AdamW's beta2 for LoRA: short runs need a short memory (docs/method.md section 5)."""
        if self.beta2 is not None:
            return self.beta2
        return min(0.5 ** (_HALF_LIVES / self.total), _LONGEST_BETA2)

    def rate(self, scored: float) -> float:
        """The highest learning rate of LoRA where a step has so many tokens with a loss, on average.

        Fewer tokens make a noisier gradient; with Adam the rate that it bears goes with the square root of the batch
        (Malladi et al., arXiv 2205.10287). dev/LOG.md has what was measured.
        """
        if self.lr is not None:
            return self.lr
        return _HIGHEST_RATE * math.sqrt(min(max(scored, 1.0), ENOUGH_SCORED) / ENOUGH_SCORED)

    def embeddings_rate(self, rate: float) -> float:
        """The learning rate of the embeddings in a step whose LoRA has this one."""
        if self.embeddings_lr is None or not self.lr:
            return _EMBEDDINGS_SHARE * rate
        return self.embeddings_lr * (rate / self.lr)

    @property
    def beside_lora(self) -> str:
        """What is trained besides LoRA, in words; empty if nothing is."""
        embeddings = "the input embeddings, from the first step on" if self.embeddings else ""
        full = "all weights, after the cut" if self.after_cut == "full" else ""
        return "; ".join(part for part in (embeddings, full) if part)

    def clips_updates(self, scored: float) -> bool:
        """Whether LoRA's updates are clipped (`atp.training.optimizer`) where a step has so many tokens with a loss."""
        return scored < ENOUGH_SCORED if self.update_clipping is None else self.update_clipping

    @model_validator(mode="after")
    def _has_one_length(self) -> TrainingConfig:
        steps = ["steps"] if self.steps != type(self).model_fields["steps"].default else []
        given = [*steps, *self.budget]
        if len(given) > 1:
            raise ValueError(f"{' and '.join(given)} are one length in different units: give one of them")
        return self

    @model_validator(mode="after")
    def _has_rates_of_what_it_trains(self) -> TrainingConfig:
        for rate, key, value, trained in (
            ("full_lr", "after_cut", "full", self.after_cut == "full"),
            ("embeddings_lr", "embeddings", "true", self.embeddings),
        ):
            if getattr(self, rate) is not None and not trained:
                raise ValueError(f"{rate} is the rate of {key}={value}: set that, or leave {rate} out")
        return self

    @model_validator(mode="after")
    def _fits(self) -> TrainingConfig:
        before = self.opened + self.search + self.settle
        if self.tune is None and before > self.steps:
            raise ValueError(
                f"open, search and settle take {before} steps, more than steps ({self.steps}): raise it, or set tune"
            )
        return self
