"""`atp export`: a model, cut or not, in a form that another runtime reads. `TARGETS` is the table of forms."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from pydantic import ValidationError

from atp.config import ModelConfig
from atp.config.overrides import explain
from atp.ground import progress
from atp.ground.errors import InputError, shorten
from atp.ground.files import check_writable, remove_leftovers_of
from atp.ground.places import PACKAGED_MODEL, model_place, refuse_no_model, run_of
from atp.ground.reading import existing
from atp.ground.requirements import require

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

    from atp.models.config import CutConfig

# What needs torch is imported where it is used, so that wrong options are refused at once.


@dataclass(frozen=True)
class ExportSource:
    """The model to export, before its weights are read.

    where: names it in messages. folder: its own, if it has one. config: as its folder has it. facts: what its card
    tells, and its `name`.
    """

    where: str
    folder: Path | None
    place: ModelConfig
    config: PretrainedConfig
    facts: dict[str, Any]

    @property
    def shapes(self) -> CutConfig:
        """Its config as that of a cut model; whole models keep all widths. Raises `InputError` for unknown families."""
        from atp.families import is_cut
        from atp.models.config import CutConfig

        return cast(CutConfig, self.config) if is_cut(self.config) else CutConfig.from_whole(self.config)

    @property
    def run(self) -> Path | None:
        """The run folder that the model is the result of."""
        return None if self.folder is None else run_of(str(self.folder))

    def load(self) -> PreTrainedModel:
        """The weights in the dtype of their files. Raises `InputError` if they are quantized or not finite."""
        from atp.inputs.loading import load_any_model
        from atp.processes.finite import refuse_weights

        if getattr(self.config, "quantization_config", None) is not None:
            raise InputError(f"the weights of {self.where} are quantized: give it in float32, bfloat16 or float16")
        progress.begin("loading")
        model = load_any_model(self.place)
        refuse_weights(model)
        return model


@dataclass(frozen=True)
class ExportTarget:
    """A form that a model is exported to.

    dtypes: what its weights can be, the default first. ending: of the name of the file or folder. write: takes the
    model, one of the dtypes and the path to write, which does not exist yet, and returns remarks, one sentence each.
    """

    dtypes: Sequence[str]
    ending: str
    write: Callable[[ExportSource, str, Path], list[str]]


def export(source: str, to: str, dtype: str | None, out: Path | None) -> tuple[Path, list[str]]:
    """Writes a model in another form: where it is then, and remarks on it.

    source: a run folder, whose final model is taken, or what `model.path` of a config can be. dtype, out: None takes
    the target's default, and a name beside the model's folder. Raises `InputError` before anything is written.
    """
    if to not in TARGETS:
        raise InputError(f"--to {shorten(to)} is unknown: use {', '.join(TARGETS)}")
    target = TARGETS[to]
    dtype = dtype or target.dtypes[0]
    if dtype not in target.dtypes:
        raise InputError(f"--dtype {shorten(dtype)} does not exist for {to}: use one of {', '.join(target.dtypes)}")
    model, folder, name = _model_of(source)
    place = folder or Path(name or "model")
    path = place.with_name(f"{place.name}-{dtype}{target.ending}") if out is None else out
    if os.path.lexists(path):
        raise InputError(f"{path} exists already: choose another --out")
    if not path.parent.is_dir():
        raise InputError(f"folder {path.parent} of --out does not exist: create it or choose another --out")
    check_writable(path.parent, "--out")
    remove_leftovers_of(path)
    return path, target.write(_read(model, folder, name), dtype, path)


def _model_of(source: str) -> tuple[str, Path | None, str]:
    """`model.path` of the model, its folder if it has one, and what to call it if its card does not tell."""
    refuse_no_model(source)
    path, gguf_file = model_place(source)
    folder = existing(path)
    if folder is None:
        return source, None, source.rpartition("/")[2].rpartition(":")[2]
    if gguf_file is not None:
        return source, folder.resolve(), gguf_file.removesuffix(".gguf")
    run = run_of(path)
    return path, folder.resolve() if run is None else folder, (run or folder).resolve().name


def _read(model: str, folder: Path | None, name: str) -> ExportSource:
    from atp.export.card import PACKAGED, facts_of_card
    from atp.inputs.loading import load_shapes

    try:
        place = ModelConfig(path=model)
    except ValidationError as error:
        raise InputError(f"the model: {explain(error, ModelConfig)}") from None
    config = load_shapes(place)
    dtype = str(config.dtype).removeprefix("torch.")
    place = ModelConfig(path=model, dtype=dtype if dtype in ("bfloat16", "float16") else "float32")
    facts = PACKAGED if model == PACKAGED_MODEL else {}
    if folder:
        facts = facts_of_card(folder / "README.md", ("license", "language", "base_model", "model_name"))
    return ExportSource(shorten(model), folder, place, config, {"name": facts.get("model_name", name), **facts})


def _write_gguf(source: ExportSource, dtype: str, out: Path) -> list[str]:
    from atp.export.gguf import architecture_of, write_gguf
    from atp.inputs.loading import load_tokenizer
    from atp.models.fused import split_projections

    shapes = source.shapes
    architecture = architecture_of(shapes, source.where)
    tokenizer = load_tokenizer(source.place)
    remarks = write_gguf(split_projections(source.load()), shapes, tokenizer, architecture, dtype, out, source.facts)
    return [f"llama.cpp's architecture {architecture.name}, {out.stat().st_size / 1e6:.1f} MB", *remarks]


def _write_quantized(source: ExportSource, scheme: str, out: Path) -> list[str]:
    from atp.export.quantized import SCHEMES, write_quantized
    from atp.families import family_of
    from atp.inputs.loading import load_tokenizer

    family_of(source.config)  # which other families are refused
    require(SCHEMES[scheme].package)
    tokenizer = load_tokenizer(source.place)
    card = None if source.folder is None else source.folder / "README.md"
    return write_quantized(
        source.load(), tokenizer, scheme, out, source.where, card=card, facts=source.facts, run=source.run
    )


TARGETS = {
    "gguf": ExportTarget(("f16", "f32", "bf16", "q8_0", "q4_1"), ".gguf", _write_gguf),
    **{scheme: ExportTarget((scheme,), "", _write_quantized) for scheme in ("int8", "nf4")},
}
