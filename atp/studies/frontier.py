"""`atp frontier`: models as GGUF files of 16, 8 and 4 bits, with the size, the speed and the scores of each file.

Every model is scored on the test data of one run, each with its own tokenizer. A file is scored as it is: its tensors
are dequantized in float32 into the model that transformers runs. llama.cpp also rounds what goes into its products.
"""

from __future__ import annotations

import csv
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from atp.baselines.tuner import DENSE, stock_lora
from atp.config import ATPConfig, ModelConfig
from atp.data.packages import smollm2_gguf
from atp.evaluation.llama_cpp import rates
from atp.export.gguf import Architecture, architecture_of, read_back, write_gguf
from atp.families import is_cut
from atp.ground import heap, progress
from atp.ground.errors import InputError, shorten
from atp.ground.files import check_writable, read_json, remove_leftovers, sha256, write_csv
from atp.ground.locking import locked
from atp.ground.places import PACKAGED_MODEL, refuse_no_model, run_of
from atp.ground.reading import existing
from atp.ground.requirements import find, require
from atp.inputs.folders import RESOLVED, VOCABULARY
from atp.inputs.loading import (
    check_vocabulary,
    load_any_model,
    load_shapes,
    load_tokenizer,
    refuse_quantized,
)
from atp.models.config import CutConfig
from atp.models.load import commit
from atp.removal import merge_adapter
from atp.report.beside import main_metric
from atp.studies.frontier_table import Row, write_pages
from atp.studies.scores import Scores
from atp.training import checkpoint as checkpoints
from atp.training.resume import of_model_folder
from atp.vocabulary.vocabulary import Vocabulary, written

BITS = {16: "f16", 8: "q8_0", 4: "q4_1"}
"""The files of a model, as `atp.export.gguf.DTYPES` names what is in them."""
CUT, TUNED, ORIGINAL, RIVAL = "cut", "dense", "original", "rival"
_TABLE = "frontier.csv"
_TEXTS = ("model", "kind", "file", "sha256", "source", "scored_on")
_SPEEDS = ("prefill_tokens_per_second", "decode_tokens_per_second", "threads")


@dataclass(frozen=True)
class Model:
    """A model of the frontier.

    kind: cut; dense, the original tuned whole; original, untuned; or rival, any other one. run: the run folder that
    has only the adapter of a tuned dense model, which has the words that the run kept.
    """

    name: str
    kind: str
    place: ModelConfig
    run: Path | None = None

    @cached_property
    def vocabulary(self) -> Vocabulary | None:
        """The words of a tuned dense model whose run trimmed them; None where the model's files say all."""
        kept = None if self.run is None else written(self.run / VOCABULARY)
        return None if kept is None else Vocabulary(kept, load_tokenizer(self.place))

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The one that the model was tuned with."""
        return load_tokenizer(self.place) if self.vocabulary is None else self.vocabulary.tokenizer

    @cached_property
    def stock(self) -> PretrainedConfig:
        """The config of the model. Raises `InputError` for quantized weights."""
        config = load_shapes(self.place)
        refuse_quantized(self.place, config)
        return config if self.vocabulary is None else self.vocabulary.shapes(config)

    @cached_property
    def shapes(self) -> CutConfig:
        """The config as that of a cut model. Raises `InputError` for unknown families."""
        config: Any = self.stock
        return config if is_cut(config) else CutConfig.from_whole(config)

    @cached_property
    def architecture(self) -> Architecture:
        """That of its files. Raises `InputError` for what llama.cpp cannot run."""
        return architecture_of(self.shapes, self.where)

    @property
    def where(self) -> str:
        """Names it in messages."""
        return f"{self.name} ({shorten(self.place.path)})"

    @cached_property
    def fingerprint(self) -> str:
        """What the weights are, without reading them as a model."""
        place, folder = self.place, existing(self.place.path)
        if place.path == PACKAGED_MODEL:
            found = sha256(smollm2_gguf())
        elif folder is None:
            found = f"{place.path}@{commit(place.path, place.gguf_file, place.revision) or place.revision}"
        elif place.gguf_file is not None:
            found = sha256(folder / place.gguf_file)
        else:
            found = str(of_model_folder(folder))
        adapter = None if self.run is None else _adapter(self.run)
        return found if adapter is None else f"{found}+{of_model_folder(adapter)}"

    def load(self) -> PreTrainedModel:
        """The model in float32, an adapter merged in."""
        progress.begin(f"loading {self.name}")
        model = load_any_model(self.place)
        if self.vocabulary is not None:
            self.vocabulary.trim(model)
        adapter = None if self.run is None else _adapter(self.run)
        if self.run is None or adapter is None:
            return model
        wrapped = stock_lora(model, ATPConfig.load(self.run / RESOLVED))
        state, trained = checkpoints.load(adapter), dict(wrapped.named_parameters())
        for name, tensor in (state.part("best") or state.part("model")).items():
            trained[name].data.copy_(tensor)
        return merge_adapter(wrapped)


def models_of(sources: Sequence[str]) -> tuple[list[Model], ATPConfig]:
    """The models that run folders and model folders name, each once, and the config of the first run that cuts.

    Raises `InputError` without such a run, for a run that is not finished, and for runs of different test data.
    """
    found: list[Model] = []
    first: tuple[Path, dict[str, Any]] | None = None
    for source in sources:
        run = run_of(source)
        if run is None:
            refuse_no_model(source)
            found.append(Model(source.rstrip("/").rpartition("/")[2], RIVAL, _place(source)))
            continue
        summary = read_json(run / "summary.json")
        if summary is None or not (run / "model" / "config.json").is_file():
            raise InputError(f"run {shorten(run)} is not finished: continue it with --resume, or leave it out")
        if "rival" not in summary:
            first = first or (run, summary)
            if summary["data"]["test"] != first[1]["data"]["test"]:
                raise InputError(
                    f"runs {shorten(first[0])} and {shorten(run)} have different test data, so their scores cannot be "
                    "compared: give runs of the same data"
                )
        found += _of_run(run, summary)
    if first is None:
        raise InputError("all models are scored on the test data of a run: give the folder of a finished run first")
    return list(_named(found)), ATPConfig.load(first[0] / RESOLVED)


def _of_run(run: Path, summary: dict[str, Any]) -> Iterator[Model]:
    config, method = ATPConfig.load(run / RESOLVED), summary.get("method")
    place = config.model.model_copy(update={"dtype": "float32", "load_in": None})
    if "rival" not in summary:
        yield Model("original", ORIGINAL, place)
    if _adapter(run) is not None:
        yield Model("tuned dense", TUNED, place, run)
    kind = RIVAL if "rival" in summary else TUNED if method == DENSE else CUT
    yield Model(run.resolve().name, kind, _place(str(run)))


def _named(models: list[Model]) -> Iterator[Model]:
    """Each model once, under a name of its own."""
    seen: set[str] = set()
    names: set[str] = set()
    for model in models:
        if model.fingerprint in seen:
            continue
        seen.add(model.fingerprint)
        where = (model.run or Path(model.place.path)).name if model.kind in (TUNED, ORIGINAL) else model.place.path
        name = model.name if model.name not in names else f"{model.name} ({where})"
        names.add(name)
        yield Model(name, model.kind, model.place, model.run)


def _place(source: str) -> ModelConfig:
    return ModelConfig(path=source, dtype="float32")


def _adapter(run: Path) -> Path | None:
    """The last checkpoint of the dense model that a run tuned; None without one."""
    return checkpoints.newest(run / DENSE / "checkpoints")


def _check(model: Model, scores: Scores) -> None:
    """Raises `InputError` for a model that cannot be scored or written."""
    check_vocabulary(model.place, load_tokenizer(model.place))
    scores.check(model.stock, model.tokenizer)
    architecture_of(model.shapes, model.where)


def _figures(scores: dict[str, Any]) -> Row:
    """Bits per byte of the text that the run scores, and the main metric of each task, with intervals."""
    row = _figure("bits_per_byte", scores, "bits_per_byte")
    for task, found in scores["tasks"].items():
        metric = main_metric({task: {"": found}}, task)
        row |= _figure(f"{task} {metric}", found, metric)
    return row


def _figure(name: str, scores: dict[str, Any], key: str) -> Row:
    low, high = scores.get(f"{key}_interval", (None, None))
    return {name: scores.get(key), f"{name} low": low, f"{name} high": high}


def frontier(
    sources: Sequence[str], out: Path, *, threads: int = 1, say: Callable[[str], None] = print
) -> tuple[list[Row], list[str]]:
    """Writes the files and frontier.csv, .md and, with matplotlib, .png; returns the rows and what they say.

    sources: run folders, and model folders or GGUF files beside at least one run. out: keeps the files, so that the
    command goes on where it was stopped; rows of the same files are not measured again. threads: of llama.cpp, whose
    columns stay empty without package xllamacpp. Raises `InputError` before anything is written.
    """
    require("gguf")
    models, config = models_of(sources)
    if out.is_file() or (out.is_dir() and any(out.iterdir()) and not (out / _TABLE).is_file()):
        raise InputError(f"{shorten(out)} holds something else: choose another --out")
    check_writable(out, "--out")
    scores = Scores(config)
    for model in models:
        _check(model, scores)
    out.mkdir(parents=True, exist_ok=True)
    with locked(out):
        remove_leftovers(out)
        known, rows = _read(out / _TABLE), []
        for model in models:
            rows += _rows_of(model, scores, known, out, say)
            # Rows of models that come later stay, should the command be stopped.
            write_csv(out / _TABLE, _merged(rows, known))
        if find("xllamacpp") is not None:
            _time(rows, out, threads, say)
        write_csv(out / _TABLE, rows)
        return rows, write_pages(out, rows)


def _merged(rows: list[Row], known: list[Row]) -> list[Row]:
    done = {(row["model"], row["bits"]) for row in rows}
    return rows + [row for row in known if (row["model"], row["bits"]) not in done]


def _rows_of(model: Model, scores: Scores, known: list[Row], out: Path, say: Callable[[str], None]) -> list[Row]:
    """The rows of a model's files; what is known of a file with the same content is taken over."""
    paths = {bits: out / f"{_file_name(model.name)}-{dtype}.gguf" for bits, dtype in BITS.items()}
    sources = {(row["source"], row["bits"]): row for row in known}
    before = {bits: sources.get((model.fingerprint, bits), {}) for bits in BITS}
    there = {bits: path.is_file() and sha256(path) == before[bits].get("sha256") for bits, path in paths.items()}
    measured = {row["sha256"]: row for row in known if row["scored_on"] == scores.fingerprint}
    loaded = None if all(there.values()) else model.load()
    facts = {"name": model.name}
    for bits, path in paths.items():
        if not there[bits] and loaded is not None:
            path.unlink(missing_ok=True)
            say(f"{model.name}: writing {path.name}")
            write_gguf(loaded, model.shapes, model.tokenizer, model.architecture, BITS[bits], path, facts)
    rows: list[Row] = []
    for bits, path in paths.items():
        found = str(before[bits]["sha256"]) if there[bits] else sha256(path)
        row = measured.get(found)
        if row is None:
            loaded = loaded or model.load()
            say(f"{model.name}: scoring {path.name}")
            read_back(loaded, model.shapes, model.architecture, path)
            row = dict.fromkeys(_SPEEDS) | _figures(scores.of(loaded, model.tokenizer, path.name))
        own = {"model": model.name, "kind": model.kind, "bits": bits, "megabytes": path.stat().st_size / 1e6}
        told = {"file": path.name, "sha256": found, "source": model.fingerprint, "scored_on": scores.fingerprint}
        rows.append(own | row | own | told)  # what is taken over may have had another name
    del loaded
    heap.give_back()
    return rows


def _time(rows: list[Row], out: Path, threads: int, say: Callable[[str], None]) -> None:
    """Adds what llama.cpp needs for the files that were not timed with so many threads; they take turns."""
    missing = [row for row in rows if row["threads"] != threads]
    if not missing:
        return
    say(f"llama.cpp: timing {len(missing)} files")
    progress.begin("timing files")
    for row, speeds in zip(missing, rates([out / row["file"] for row in missing], threads=threads), strict=True):
        row |= dict(zip(_SPEEDS, (*speeds, threads), strict=True))


def _file_name(name: str) -> str:
    return re.sub(r"[^A-Za-z0-9._-]+", "_", name).strip("_.") or "model"


def _read(path: Path) -> list[Row]:
    """The rows of an earlier call, with numbers as numbers; none where the file is missing or damaged."""
    try:
        with path.open(newline="", encoding="utf-8") as file:
            return [{name: _value(name, text) for name, text in row.items()} for row in csv.DictReader(file)]
    except (OSError, ValueError, csv.Error):
        return []


def _value(name: str, text: str) -> Any:
    if name in _TEXTS:
        return text
    if text == "":
        return None
    return int(text) if name in ("bits", "threads") else float(text)
