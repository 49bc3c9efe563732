"""The commands about configs: their schema, what one resolves to, and the presets."""

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
    from atp.presets import PRESETS

    console.print(f"{ATPConfig.model_fields['preset'].default}: the defaults")
    for name, settings in PRESETS.items():
        console.print(f"{name}:\n" + _indented(yaml.safe_dump(settings, sort_keys=False)))


def _indented(text: str) -> str:
    return "".join(f"  {line}" for line in text.splitlines(keepends=True))
