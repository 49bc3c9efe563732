"""What a run will read: how many samples of which length, how often, and one of them with its loss made visible."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from itertools import groupby
from typing import Any

from torch import Tensor
from transformers import PretrainedConfig, PreTrainedTokenizerBase

from atp.config import ATPConfig
from atp.data import Splits
from atp.data.batches import IGNORE
from atp.data.encoding import encode, start_ids
from atp.data.rows import BadRows
from atp.data.tokens import Pieces
from atp.evaluation.scored_tasks import check_tasks
from atp.ground.ending import ending
from atp.ground.errors import InputError
from atp.inputs.checks import steps_per_epoch
from atp.inputs.loading import RunData, averages, check_packages, load_data, load_tokenizer
from atp.plan.job import Questions
from atp.processes import processes

_SHOWN = 96  # tokens of the sample that is shown
_BEFORE = 48  # of them before the first that has a loss
_UNREAD = "the data were not read, because there is no tokenizer: "


def data_of(
    config: ATPConfig, shapes: PretrainedConfig, count: int | None = None, kept: Tensor | None = None
) -> tuple[dict[str, Any], RunData | None]:
    """The data section of a plan, and the data. count: of processes, default that of now. kept: as in `load_data`.

    Where something is wrong `problem` says so in one sentence, and the section holds what was found until then.
    """
    found: dict[str, Any] = {"problem": None}
    data: RunData | None = None
    with _told(found):
        check_packages(config.model, config.data)
    if found["problem"] is None:
        with _told(found, _UNREAD):
            tokenizer = load_tokenizer(config.model)
    if found["problem"] is None:
        with _told(found):
            data = load_data(config, tokenizer, kept)
            found |= _described(config, data.tokenizer, data, count or processes.count())
            found["questions"] = asdict(Questions.of(check_tasks(config, data.splits, data.tokenizer, shapes)))
    return found, data


def refused(data: dict[str, Any]) -> str | None:
    """The sentence that `atp train` would end with, if it would; a plan from a config.json alone refuses nothing."""
    problem = data["problem"]
    return None if problem is None or problem.startswith(_UNREAD) else problem


def _described(config: ATPConfig, tokenizer: PreTrainedTokenizerBase, data: RunData, count: int) -> dict[str, Any]:
    train, epoch = data.train, steps_per_epoch(config, len(data.train), count)
    sample, scored = averages(train)
    first = train[0]
    return {
        "description": data.splits.description,
        "samples": _samples(data.splits),
        "lengths": _lengths(data, tokenizer),
        "longer_than_a_window": train.longer,
        "left_out": {"rows": _kinds(data.splits.skipped), "near_duplicates": data.splits.near_duplicates},
        "windows": {name: len(samples) for name, samples in data.read_in_training.items()} | {"test": len(data.test)},
        "tokens_per_epoch": round(sample * len(train)),
        "tokens_per_window": sample,
        "tokens_per_calibration_window": averages(data.calibration)[0],
        "scored_share": scored,
        "steps_per_epoch": epoch,
        "sample": shown_sample(first["input_ids"].tolist(), first["labels"].tolist(), tokenizer.decode),
    }


def _samples(splits: Splits) -> dict[str, int]:
    return {name: len(getattr(splits, name)) for name in splits.parts}


def _kinds(skipped: Sequence[str]) -> dict[str, int]:
    """The rows that cannot be used, by what is wrong with them."""
    bad = BadRows()
    for sentence in skipped:
        bad(InputError(sentence))
    return {kind: len(found) for kind, found in bad.kinds.items()}


def _lengths(data: RunData, tokenizer: PreTrainedTokenizerBase) -> dict[str, float]:
    """Tokens of the train samples as they are packed, with BOS, if the tokenizer adds it, and EOS."""
    if isinstance(data.train, Pieces):
        lengths = sorted(data.train.document_lengths.tolist())
    else:
        more = len(start_ids(tokenizer)) + 1
        lengths = sorted(len(ids) + more for ids in encode(tokenizer, (e.text for e in data.splits.train)))
    at_95 = lengths[min(round(0.95 * (len(lengths) - 1)), len(lengths) - 1)]
    return {"median": statistics.median(lengths), "percentile_95": at_95, "max": lengths[-1]}


def shown_sample(ids: list[int], labels: list[int], decode: Callable[[list[int]], Any]) -> list[dict[str, Any]]:
    """A part of a window as pieces of text, each with whether its tokens have a loss.

    ids, labels: as in the data sets of `atp.data`. It starts a little before the first token with a loss.
    """
    scored = [place > 0 and label != IGNORE for place, label in enumerate(labels)]
    first = max(scored.index(True) - _BEFORE, 0) if True in scored else 0
    part = list(zip(ids, scored, strict=True))[first : first + _SHOWN]
    return [
        {"text": str(decode([token for token, _ in piece])), "loss": loss}
        for loss, piece in ((loss, list(group)) for loss, group in groupby(part, key=lambda pair: pair[1]))
    ]


@contextmanager
def _told(found: dict[str, Any], before: str = "") -> Iterator[None]:
    """Whatever goes wrong inside becomes the section's problem, in the sentence that a command would end with."""
    try:
        yield
    except Exception as error:
        found["problem"] = before + ending(error)[0]
