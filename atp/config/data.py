"""The section `data` of the configuration."""

from __future__ import annotations

import math
from typing import Any, Literal

from pydantic import Field, ValidationInfo, field_validator

from atp.config.section import Section


class DataConfig(Section):
    """Data, as in `atp.data.DataSettings`."""

    recipe: str = Field("custom", description="Data set and its split (docs/data.md).")
    seed: int | None = Field(None, ge=0, description="Seed of the splits; null uses the run's seed.")
    train: str | tuple[str, ...] | dict[str, float] | None = Field(
        None,
        description="Training data: a file, a folder or a Hub name, a list of them, or a mapping from each to its "
        "weight.",
    )
    calibration: str | tuple[str, ...] | None = Field(
        None, description="Calibration data, without weights; null: a part of train."
    )
    test: str | tuple[str, ...] | None = Field(None, description="Test data, without weights; null: a part of train.")
    validation: str | tuple[str, ...] | None = Field(
        None, description="Validation data for evaluation.every, without weights; null: a part of train."
    )
    columns: dict[str, str] = Field(
        default_factory=dict, description="Mapping from ATP's column names to those of the files."
    )
    on_error: Literal["stop", "skip"] = Field("stop", description="Action for an unusable row of recipe custom.")
    general: str | None = Field(None, description="General text among the calibration samples; null: the recipe's.")
    labels: tuple[str, ...] = Field((), description="Allowed answers of recipe custom, for questions scored by label.")
    label_names: tuple[str, ...] = Field((), description="Names of the labels 0, 1, ... for rows that hold numbers.")
    test_half: Literal["open", "sealed"] | None = Field(
        None,
        description="Half of the test documents that is scored: the open one, the sealed one that no choice has seen, "
        "or null for both.",
    )
    test_share: float = Field(
        0.2, gt=0, lt=1, description="Share of all documents for the test split, without test data."
    )
    calibration_share: float = Field(
        0.1, gt=0, lt=1, description="Share of all documents for calibration, without calibration data."
    )
    validation_share: float = Field(0.05, gt=0, lt=1, description="Share of the training documents for validation.")
    general_share: float | None = Field(None, ge=0, lt=1, description="Share of general text in the calibration set.")
    limit: int | None = Field(None, ge=1, description="Rows to read per source of recipe custom.")
    sources: dict[str, str] = Field(
        default_factory=dict, description="Mapping from a recipe's data sets to files or Hub names."
    )
    scale: float = Field(
        1.0, gt=0, description="Factor on the paper's sample counts, for recipes health, legal and general."
    )
    length: int = Field(256, ge=16, description="Tokens per packed window.")
    workers: int = Field(
        0, ge=0, description="Worker processes for tokenizing large sources of recipe custom; 0: none."
    )
    packing: Literal["joined", "separate", "fitted", "padded"] = Field(
        "joined",
        description="Packing of samples into training windows: concatenated; kept apart by the attention mask; "
        "kept apart and whole, best fit; or one padded sample per row.",
    )
    loss_on: Literal["all", "completion", "assistant"] = Field(
        "assistant",
        description="Tokens with a loss: all; the completion or last answer; or every answer of a conversation. "
        "Plain text always uses all.",
    )

    @property
    def own_sources(self) -> list[tuple[str, str]]:
        """(config key, source) of everything that `train` and the keys of other files name."""
        given = {f"data.{key}": getattr(self, key) for key in ("train", "calibration", "test", "validation", "general")}
        listed = {key: [sources] if isinstance(sources, str) else sources or () for key, sources in given.items()}
        return [(key, source) for key, sources in listed.items() for source in sources]

    @field_validator("train", "calibration", "test", "validation", mode="before")
    @classmethod
    def _are_sources(cls, value: Any, info: ValidationInfo) -> Any:
        """Refuses what names no source, in one sentence for all forms."""
        if isinstance(value, dict) and value and info.field_name == "train":
            if not all(isinstance(source, str) and _is_weight(weight) for source, weight in value.items()):
                raise ValueError("weights are numbers above 0, each after the name of its source")
        elif value is not None and not isinstance(value, str):
            if not (isinstance(value, (list, tuple)) and value and all(isinstance(source, str) for source in value)):
                weights = ", or a mapping of these to weights" if info.field_name == "train" else ""
                raise ValueError(f"give a file, a folder or a Hub name, a list of these{weights}")
        return value


def _is_weight(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value) and value > 0
