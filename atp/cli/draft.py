"""A first config for a model and data, after a look at both: for `atp init`."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from transformers import PretrainedConfig, PreTrainedTokenizerBase

from atp.cli.columns import Columns, given_columns, guess_columns, labels_of
from atp.config import ATPConfig, DecisionsConfig, ModelConfig
from atp.config.overrides import apply
from atp.config.presets import merged
from atp.data.batches import IGNORE
from atp.data.chat import chat_of
from atp.data.custom import Meaning, examples_of
from atp.data.examples import Example
from atp.data.files import read_rows
from atp.data.rows import BadRows, Row
from atp.data.tokens import documents_of
from atp.families import family_of
from atp.ground import progress
from atp.ground.errors import InputError, shorten
from atp.inputs.checks import reads_often, scored_every, steps_per_epoch, within_data
from atp.inputs.loading import check_prunable, load_data, load_shapes, load_tokenizer
from atp.inputs.resolve import resolve
from atp.inputs.targets import at_share

_LENGTHS = (64, 128, 256, 512, 1024, 2048)  # tokens per window that are suggested
_STEPS, _MOST_ROWS = 400, 16  # the default, and the most samples per step
_LABEL_ROWS, _FEWEST_LABEL_STEPS, _MOST_LABEL_STEPS = 4, 200, 1600  # smaller steps, and more of them (dev/LOG.md)
_STEP_TOKENS, _STEP_SCORED = 256, 64  # samples are batched up to so many, and so many with a loss (dev/LOG.md)
_OFTEN = 4  # times that a run reads its data
_SPACE = DecisionsConfig.model_fields["space"].default
_FEW_BAD = 0.1  # of the rows, up to which they are left out
_HEAD = """\
# Written by atp init. `atp plan` says what it will do and cost, `atp train` does it, and `atp config schema` lists all
# keys with their meaning and range.
"""

Ask = Callable[[Columns, Sequence[str]], dict[str, str]]
"""Asks what columns hold, from a guess and the names that there are; returns `data.columns`."""


class UnusableRows(InputError):
    """So many rows cannot be used that no config is written. rows: all of them."""

    def __init__(self, message: str, rows: BadRows) -> None:
        super().__init__(message)
        self.rows = rows


@dataclass(frozen=True)
class Draft:
    """The text of a config, what was found, in sentences, and the rows that the run will leave out."""

    text: str
    remarks: list[str]
    bad: BadRows


@dataclass
class _Found:
    """What was seen of the data.

    examples: of the rows that can be used; bad: the others. whole: whether those are all rows. labels: the answer set.
    lengths, scored: tokens of each sample, and those of them with a loss.
    """

    guess: Columns
    examples: list[Example]
    bad: BadRows
    whole: bool
    labels: list[str] = field(default_factory=list)
    lengths: list[int] = field(default_factory=list)
    scored: list[int] = field(default_factory=list)

    @property
    def talks(self) -> bool:
        """Whether the rows are conversations."""
        return self.guess.shape not in ("text", "prompt and completion", "premise and hypothesis")

    @property
    def batch_size(self) -> int:
        """Training rows per step: windows of text one by one, of samples as many as give a step enough to learn from.

        Few data give fewer, lest each sample is read often. Of labels, a token or two each, a step reads 4.
        """
        if self.guess.shape == "text":
            return 1
        rows = max(
            _STEP_TOKENS / statistics.median(self.lengths), _STEP_SCORED / max(statistics.median(self.scored), 1)
        )
        most = _LABEL_ROWS if self.labels else min(_MOST_ROWS, self._readings / _STEPS)
        size = 1
        while size < rows and 2 * size <= most:
            size *= 2
        return size

    @property
    def steps(self) -> int:
        """Steps that are suggested."""
        if not self.labels:
            return _STEPS
        return min(max(int(self._readings) // self.batch_size, _FEWEST_LABEL_STEPS), _MOST_LABEL_STEPS)

    @property
    def _readings(self) -> float:
        """How many samples a run may read."""
        return _OFTEN * len(self.examples) if self.whole else _STEPS * _MOST_ROWS


def draft(
    model: str, data: str, *, rows: int = 1000, keep: float = 0.6, gguf_file: str | None = None,
    columns: dict[str, str] | None = None, overrides: Sequence[str] = (), ask: Ask | None = None,
) -> Draft:  # fmt: skip
    """Looks at a model's config and tokenizer, and at the first `rows` rows of a data source; reads no weights.

    model, data, keep, columns: as `model.path`, `data.train`, `decisions.target_keep` and `data.columns`. overrides:
    `key.path=value`, which win. ask: asked where names do not say what columns hold; None: these are guessed. Rows that
    cannot be used are left out where they are few. Raises `InputError` for a model that cannot be pruned, for data that
    cannot be read or split, and `UnusableRows`.
    """
    given = _given(overrides)
    first = {"model": {"path": model, "gguf_file": gguf_file}, "output_dir": "unused", "data": {"train": data}}
    asked = ATPConfig.parse(merged(first, given))
    progress.begin("reading the data")
    bad = BadRows()
    found_rows = read_rows(data, rows + 1, bad)
    whole, found_rows = len(found_rows) <= rows, found_rows[:rows]
    guess = _columns([row.values for row in found_rows], columns or asked.data.columns, ask)
    progress.begin("reading config and tokenizer of the model")
    shapes = load_shapes(asked.model)
    space = asked.decisions.space if _holds(given, "decisions.space") else family_of(shapes).space
    check_prunable(asked.model, shapes, space)
    tokenizer = load_tokenizer(asked.model)
    progress.begin("counting tokens")
    found = _look(found_rows, guess, bad, whole, asked, tokenizer)
    length = _length(found, shapes)
    values, notes = _values(asked.model, data, found, length, keep, space)
    notes = {key: note for key, note in notes.items() if not _holds(given, key)}
    config = ATPConfig.parse(merged(values, given))
    if whole:
        config = _fitted(config, values, notes, given, tokenizer)
    return Draft(_text(merged(values, given), notes), _remarks(found, config.data.length, tokenizer), bad)


def _given(overrides: Sequence[str]) -> dict[str, Any]:
    given: dict[str, Any] = {}
    for override in overrides:
        apply(given, override)
    for section, key, name in (("model", "path", "MODEL"), ("data", "train", "DATA")):
        if isinstance(given.get(section), dict) and key in given[section]:
            raise InputError(f"{section}.{key} is argument {name} of atp init: give it there")
    return given


def _columns(rows: Sequence[dict[str, Any]], columns: dict[str, str], ask: Ask | None) -> Columns:
    if not rows:  # all are bad, which is told with their reasons
        return Columns("text")
    if columns:
        return given_columns(rows, columns)
    guess = guess_columns(rows)
    if guess.sure or ask is None:
        return guess
    return given_columns(rows, ask(guess, list(dict.fromkeys(name for row in rows for name in row))))


def _look(
    rows: Sequence[Row], guess: Columns, bad: BadRows, whole: bool, asked: ATPConfig, tokenizer: PreTrainedTokenizerBase
) -> _Found:
    chat = chat_of(tokenizer, every_turn=asked.data.loss_on == "assistant")
    labels = asked.data.labels or tuple(guess.labels)
    meaning = Meaning(labels, asked.data.label_names or tuple(guess.label_names), guess.columns, chat)
    found = _Found(guess, list(examples_of(rows, meaning, bad)), bad, whole)
    every = len(bad) + len(found.examples)
    if len(bad) > _FEW_BAD * every:
        raise UnusableRows(
            f"{len(bad)} of {every} rows cannot be used (most often: {bad.most}), so no config is written: correct "
            "them, or say with --columns what the columns hold",
            bad,
        )
    if guess.shape == "premise and hypothesis":
        found.labels = sorted({example.label for example in found.examples if example.label})
    elif guess.shape == "prompt and completion":
        found.labels = labels_of([example.completion.strip() for example in found.examples])
    documents = documents_of(found.examples, tokenizer, asked.data.loss_on)
    found.lengths = [len(ids) for ids, _ in documents]
    found.scored = [sum(label != IGNORE for label in labels[1:]) for _, labels in documents]
    return found


def _length(found: _Found, shapes: PretrainedConfig) -> int:
    """The shortest usual window that holds 95 of 100 samples, within the model's positions."""
    wanted = _at_95(found.lengths)
    length = next((length for length in _LENGTHS if length >= wanted), _LENGTHS[-1])
    limit = getattr(shapes.get_text_config(), "max_position_embeddings", None)
    return length if limit is None else min(length, limit)


def _at_95(lengths: Sequence[int]) -> int:
    return sorted(lengths)[min(round(0.95 * (len(lengths) - 1)), len(lengths) - 1)]


def _fitted(
    config: ATPConfig, values: dict[str, Any], notes: dict[str, str], given: dict[str, Any],
    tokenizer: PreTrainedTokenizerBase,
) -> ATPConfig:  # fmt: skip
    """Splits the data as the run will, and writes to values what `atp plan` would otherwise advise of them."""

    def set_to(key: str, value: object, note: str) -> None:
        section, name = key.split(".")
        if not _holds(given, key):
            values.setdefault(section, {})[name] = value
            notes[key] = note

    progress.begin("splitting the data")
    data = load_data(config, tokenizer)
    if reads_often(config, steps_per_epoch(config, len(data.train), 1)):
        set_to("evaluation.every", scored_every(config), "steps from one score on held-out samples to the next")
        set_to("training.keep_best", True, "the adapter of the best of them, as samples are read often")
        config = ATPConfig.parse(merged(values, given))
        data = load_data(config, tokenizer)
    # What is read does not depend on the target, which may have to be measured.
    for key, there in within_data(resolve(at_share(config, 0.5), steps=config.training.total), data).items():
        set_to(key, max(there, 0 if key.endswith("questions") else 1), "as many as the data hold")
    config = ATPConfig.parse(merged(values, given))
    epochs = config.training.total / steps_per_epoch(config, len(data.train), 1)
    notes["training.steps"] = f"about {epochs:.2f} times through these data, without what is held out"
    return config


def _remarks(found: _Found, length: int, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    count = len(found.examples)
    seen = f"all {count} rows" if found.whole else f"the first {count} rows"
    usable = f" that can be used, of {count + len(found.bad)}" if found.bad else ""
    remarks = [
        f"data: {found.guess.shape}, by {seen}{usable}",
        f"lengths: {statistics.median(found.lengths):.0f} tokens at the median, {_at_95(found.lengths)} for 95 of 100, "
        f"{max(found.lengths)} at most; data.length is {length}",
    ]
    if found.guess.columns:
        read = ", ".join(f"{theirs} as {ours}" for ours, theirs in found.guess.columns.items())
        mapped = ",".join(f"{ours}={theirs}" for ours, theirs in found.guess.columns.items())
        wrong = f", a guess by their content; if it is wrong, give --columns {mapped} with other names"
        doubt = "" if found.guess.sure else wrong
        remarks.append(f"columns: {read}{doubt}")
    if found.labels:
        remarks.append(f"labels: {shorten(', '.join(found.labels))}")
    remarks += found.guess.remarks
    if found.guess.label_names:
        remarks.append("the labels are numbers: write what they mean to data.label_names, in words to answer with")
    if found.talks and tokenizer.chat_template is None:
        remarks.append("the tokenizer has no chat template: turns are written as `Role: text`, a line each")
    copies = count - len({example.text for example in found.examples})
    if copies:
        remarks.append(f"{copies} rows are copies of others, and stay in one split with them")
    return remarks


def _values(
    model: ModelConfig, data: str, found: _Found, length: int, keep: float, space: str
) -> tuple[dict[str, Any], dict[str, str]]:
    """The keys of the config, and for some of them, by their whole name, what a reader should know."""
    guess, text, skips = found.guess, found.guess.shape == "text", len(found.bad) > 0
    name = Path(data.partition(":")[0]).name.partition(".")[0] or "data"
    of_data: dict[str, Any] = {"train": data}
    if guess.columns:
        of_data["columns"] = dict(guess.columns)
    if guess.label_names:
        of_data["label_names"] = list(guess.label_names)
    elif found.labels:
        of_data["labels"] = found.labels
    of_data |= {
        "length": length, "packing": "joined" if text else "padded", "on_error": "skip" if skips else "stop",
        "general_share": 0.0,
    }  # fmt: skip
    values: dict[str, Any] = {
        "model": {"path": model.path} | ({"gguf_file": model.gguf_file} if model.gguf_file else {}),
        "output_dir": f"runs/{name}",
        "preset": "auto",
        "data": of_data,
        "decisions": {"space": space, "target_keep": keep} if space != _SPACE else {"target_keep": keep},
        "training": {"steps": found.steps, "batch_size": found.batch_size},
        "evaluation": {"questions": 100 if found.labels else 0, "dense_baseline": False},
    }
    left_out = f"{len(found.bad)} rows cannot be used" if skips else "skip leaves out rows that cannot be used"
    return values, {
        "output_dir": "the run folder, which must not exist yet",
        "preset": "by the steps; or stock: widths that every tool can run; paper: the paper's (atp config presets)",
        "data.train": f"{guess.shape}; calibration and test are split off by document",
        "data.columns": "our name: the name in the file",
        "data.label_names": "what 0, 1, ... mean: write the words to answer with",
        "data.labels": "the answers that questions allow",
        "data.length": f"tokens per window; 95 of 100 samples have at most {_at_95(found.lengths)}",
        "data.packing": "samples fill windows together" if text else "one sample per row",
        "data.on_error": f"{left_out}; the run lists them in skipped_rows.txt",
        "data.general_share": "set data.general to a file of general text to mix it into the calibration set",
        "decisions.space": "what a decision removes; this model has no other",
        "decisions.target_keep": "the share of the decoder that stays",
        "training.steps": "atp plan says how often that reads the data",
        "training.batch_size": "rows per step" if found.batch_size > 1 else "more on a GPU",
        "evaluation.questions": "held-out questions that are scored; 0 where there are none",
        "evaluation.dense_baseline": "true also tunes the whole model, to compare with: about twice the time",
    }


def _holds(given: dict[str, Any], key: str) -> bool:
    section, _, name = key.partition(".")
    return section in given and (not name or name in given[section])


def _text(values: dict[str, Any], notes: dict[str, str]) -> str:
    """The config, with notes as comments."""
    lines = [_HEAD]
    for name, value in values.items():
        if isinstance(value, dict):
            lines.append(f"{name}:\n")
            lines += ["  " + _line(key, inner, notes.get(f"{name}.{key}")) for key, inner in value.items()]
        else:
            lines.append(_line(name, value, notes.get(name)))
    return "".join(lines)


def _line(key: str, value: Any, note: str | None) -> str:
    return f"{key}: {_scalar(value)}{'' if note is None else f' # {note}'}\n"


def _scalar(value: Any) -> str:
    """A value as YAML on one line."""
    return yaml.safe_dump(value, default_flow_style=True, allow_unicode=True, width=10**9).removesuffix("...\n").strip()
