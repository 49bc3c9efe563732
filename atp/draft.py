"""A first config for a model and data, after a look at both: for `atp init`."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from transformers import PretrainedConfig, PreTrainedTokenizerBase

from atp.columns import Columns, guess_columns, labels_of
from atp.config import ATPConfig, ModelConfig
from atp.data.batches import IGNORE
from atp.data.chat import chat_of
from atp.data.custom import Meaning, read_examples
from atp.data.files import read_rows
from atp.data.tokens import documents_of
from atp.errors import shorten
from atp.loading import check_prunable, load_shapes, load_tokenizer

_LENGTHS = (64, 128, 256, 512, 1024, 2048)  # tokens per window that are suggested
_STEPS, _MOST_ROWS = 400, 16  # the default, and the most samples per step
_LABEL_ROWS, _FEWEST_LABEL_STEPS, _MOST_LABEL_STEPS = 4, 200, 1600  # smaller steps, and more of them (docs/tasks.md)
_STEP_TOKENS, _STEP_SCORED = 256, 64  # samples are batched up to so many, and so many with a loss (docs/tasks.md)
_OFTEN = 4  # times that a run reads its data


@dataclass(frozen=True)
class Draft:
    """The text of a config, and what was found, in sentences."""

    text: str
    remarks: list[str]


@dataclass
class _Found:
    """What was seen of the data.

    rows: how many were read; whole: whether those are all. keep: the share of the decoder that is to stay. labels: the
    answer set. lengths, scored: tokens of each sample, and those of them with a loss.
    """

    guess: Columns
    rows: int
    whole: bool
    keep: float
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
        return _OFTEN * self.rows if self.whole else _STEPS * _MOST_ROWS


def draft(model: str, data: str, *, rows: int = 1000, keep: float = 0.6, gguf_file: str | None = None) -> Draft:
    """Looks at a model's config and tokenizer, and at the first `rows` rows of a data source; reads no weights.

    model, data, keep: as `model.path`, `data.train` and `decisions.target_keep`. Raises `InputError` for a model that
    cannot be pruned, and for data that cannot be read or whose columns mean nothing.
    """
    chosen = ModelConfig(path=model, gguf_file=gguf_file)
    shapes = load_shapes(chosen)
    check_prunable(chosen, shapes, "kv_group")
    tokenizer = load_tokenizer(chosen)
    found = _look(data, rows, keep, tokenizer)
    length = _length(found, shapes)
    text = _written(chosen, data, found, length)
    ATPConfig.parse(yaml.safe_load(text))
    return Draft(text, _remarks(found, length, tokenizer))


def _look(data: str, limit: int, keep: float, tokenizer: PreTrainedTokenizerBase) -> _Found:
    rows = read_rows(data, limit + 1)
    whole, rows = len(rows) <= limit, rows[:limit]
    guess = guess_columns([row.values for row in rows])
    chat = chat_of(tokenizer, every_turn=True)
    meaning = Meaning(tuple(guess.labels), tuple(guess.label_names), guess.columns, chat)
    examples = read_examples(data, limit=limit, meaning=meaning)
    found = _Found(guess, len(rows), whole, keep)
    if guess.shape == "premise and hypothesis":
        found.labels = sorted({example.label for example in examples if example.label})
    elif guess.shape == "prompt and completion":
        found.labels = labels_of([example.completion.strip() for example in examples])
    documents = documents_of(examples, tokenizer, "assistant")
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


def _remarks(found: _Found, length: int, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    seen = f"all {found.rows} rows" if found.whole else f"the first {found.rows} rows"
    remarks = [
        f"data: {found.guess.shape}, by {seen}",
        f"lengths: {statistics.median(found.lengths):.0f} tokens in the middle, {_at_95(found.lengths)} for 95 of 100, "
        f"{max(found.lengths)} at most; data.length is {length}",
    ]
    if found.guess.columns:
        remarks.append(f"columns: {', '.join(f'{theirs} as {ours}' for ours, theirs in found.guess.columns.items())}")
    if found.labels:
        remarks.append(f"labels: {shorten(', '.join(found.labels))}")
    remarks += found.guess.remarks
    if found.guess.label_names:
        remarks.append("the labels are numbers: write what they mean to data.label_names, in words to answer with")
    if found.talks and tokenizer.chat_template is None:
        remarks.append("the tokenizer has no chat template: turns are written as `Role: text`, a line each")
    return remarks


def _written(model: ModelConfig, data: str, found: _Found, length: int) -> str:
    name = Path(data.partition(":")[0]).name.partition(".")[0] or "data"
    shown = (f"    {ours}: {_scalar(theirs)}\n" for ours, theirs in found.guess.columns.items())
    columns = f"  columns: # our name: the name in the file\n{''.join(shown)}" if found.guess.columns else ""
    questions, names = "", list(found.guess.label_names)
    if names:
        questions = f"  label_names: {_scalar(names)} # what 0, 1, ... mean: write the words to answer with\n"
    elif found.labels:
        questions = f"  labels: {_scalar(found.labels)} # the answers that questions allow\n"
    gguf = f"  gguf_file: {_scalar(model.gguf_file)}\n" if model.gguf_file else ""
    packing = "joined # samples fill windows together" if found.guess.shape == "text" else "padded # one sample per row"
    if found.whole:
        rows = max(sum(found.lengths) // length, 1) if found.guess.shape == "text" else len(found.lengths)
        often = f"about {found.steps * found.batch_size / rows:.3g} times through these data"
    else:
        often = "atp plan says how often that reads the data"
    return f"""\
# Written by atp init. `atp plan` says what it will do and cost, `atp train` does it, and `atp config schema` lists all
# keys with their meaning and range.
model:
  path: {_scalar(model.path)}
{gguf}output_dir: {_scalar(f"runs/{name}")} # the run folder, which must not exist yet
preset: auto # by the steps; or stock: widths that every tool can run; paper: the paper's (atp config presets)
data:
  train: {_scalar(data)} # {found.guess.shape}; calibration and test are split off by document
{columns}{questions}  length: {length} # tokens per window; 95 of 100 samples have at most {_at_95(found.lengths)}
  packing: {packing}
  on_error: stop # skip leaves out rows that cannot be used, and lists them
  general_share: 0.0 # set data.general to a file of general text to mix it into the calibration set
decisions:
  target_keep: {found.keep} # the share of the decoder that stays
training:
  steps: {found.steps} # {often}
  batch_size: {found.batch_size} # {"rows per step" if found.batch_size > 1 else "more on a GPU"}
evaluation:
  questions: {100 if found.labels else 0} # held-out questions that are scored; 0 where there are none
  dense_baseline: false # true also tunes the whole model, to compare with: about twice the time
"""


def _scalar(value: Any) -> str:
    """A value as YAML on one line."""
    return yaml.safe_dump(value, default_flow_style=True, allow_unicode=True, width=10**9).removesuffix("...\n").strip()
