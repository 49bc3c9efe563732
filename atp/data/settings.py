"""Settings of a recipe."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from atp.data.chat import Chat, plain_chat


@dataclass(frozen=True)
class DataSettings:
    """What to load and how to split it.

    recipe: a key of `RECIPES`. seed: decides which documents go to which split.
    test_share, calibration_share: share of all documents, for splits without a source of their own (mini recipes and
    `custom`). general_share: share of general text in the calibration examples; None is the recipe's own, about a
    third, as C4 has in the paper.
    train, calibration, test: sources of recipe `custom`, each a .jsonl, .csv or .parquet file or a Hub name
    `owner/name#config:split`; without calibration or test, documents of train are split off.
    general: source of the general text; None is the recipe's own (mini recipes: OpenWebText of package `evals`, or of
    its wheel if this names a .whl file; `health`, `legal`: C4; `custom`: none).
    labels: answer set of recipe `custom`, empty for unlabelled data. limit: rows to read per source of `custom`.
    sources: other sources for the data sets of `health`, `legal` and `general`, by the names in docs/data.md.
    scale: multiplies the paper's counts, in the same recipes. chat: renders a `messages` column of `custom`.
    """

    recipe: str = "health-mini"
    seed: int = 0
    test_share: float = 0.2
    calibration_share: float = 0.1
    general_share: float | None = None
    train: str | None = None
    calibration: str | None = None
    test: str | None = None
    general: str | None = None
    labels: tuple[str, ...] = ()
    limit: int | None = None
    sources: Mapping[str, str] = field(default_factory=dict)
    scale: float = 1.0
    chat: Chat = plain_chat
