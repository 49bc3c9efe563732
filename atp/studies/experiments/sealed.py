"""Scores on the sealed half of the test documents: of runs that are finished, each once."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from atp.config import ATPConfig, ModelConfig
from atp.ground import heap, progress
from atp.ground.errors import InputError, shorten
from atp.ground.files import read_json, write_json
from atp.inputs.folders import RESOLVED
from atp.inputs.loading import load_any_model, load_tokenizer, placed
from atp.inputs.precision import autocast_dtype
from atp.studies.compare.results import Member
from atp.studies.scores import Scores

SEALED = "sealed.json"
"""The file of a run folder that holds these scores."""


def sealed(config: ATPConfig) -> ATPConfig:
    """The config that scores the sealed half."""
    return config.model_copy(update={"data": config.data.model_copy(update={"test_half": "sealed"})})


class Sealed:
    """Scores finished runs; an original model that several of them began with is scored once."""

    def __init__(self, say: Callable[[str], None] = print) -> None:
        self.say = say
        self.originals: dict[str, dict[str, Any]] = {}

    def member(self, run: Path, member: Member) -> Member:
        """The member with the scores of the sealed half in place of those of the open one.

        They are in SEALED from then on, and are not taken again. Raises `InputError` for a run that scored all.
        """
        found = read_json(run / SEALED)
        if found is None:
            config = ATPConfig.load(run / RESOLVED)
            if config.data.test_half != "open":
                raise InputError(
                    f"run {shorten(run)} scored all test documents, so none of them is sealed: run it anew with "
                    "data.test_half=open"
                )
            self.say(f"{run.name}: scoring the sealed half")
            scores = Scores(sealed(config))
            key = f"{config.model} {config.training.precision} {scores.fingerprint}"
            if key not in self.originals:
                self.originals[key] = _score(scores, "original", config.model)
            model = ModelConfig(path=str(run / "model"), dtype="auto")
            found = {"original": self.originals[key], "final": _score(scores, run.name, model)}
            write_json(run / SEALED, found)
        return Member(member.method, member.seed, member.summary, found)


def _score(scores: Scores, name: str, place: ModelConfig) -> dict[str, Any]:
    heap.give_back()
    progress.begin(f"loading {name}")
    model = placed(load_any_model(place))
    return scores.of(model, load_tokenizer(place), name, autocast_dtype(scores.config.training.precision))
