"""The terminal that the commands print to."""

from __future__ import annotations

from typing import Annotated, Any

import typer
from rich.console import Console

from atp import ranks
from atp.ending import OutputClosed


class _Console(Console):
    def print(self, *objects: Any, **options: Any) -> None:
        """As rich does; in a file, which has no width, lines of text stay whole and can be searched for."""
        if not self.is_terminal and all(isinstance(item, str) for item in objects):
            options.setdefault("soft_wrap", True)
        super().print(*objects, **options)

    def on_broken_pipe(self) -> None:
        raise OutputClosed


# Paths and names are printed as they are, brackets included.
console = _Console(quiet=not ranks.is_main(), markup=False, highlight=False)
JsonLogs = Annotated[
    bool, typer.Option("--json-logs", help="Write progress as JSON to stderr, an object per line (docs/operations.md).")
]
Quiet = Annotated[bool, typer.Option("--quiet", help="Show no progress, only results and errors.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of errors.")]
On = Annotated[str, typer.Option(help="Where the runs run: here, local, slurm or ray (docs/clusters.md).")]
Resource = Annotated[list[str] | None, typer.Option(help="Of one job of --on, as gpus_per_node=1; once or more often.")]
AtOnce = Annotated[int | None, typer.Option(min=1, help="Runs at a time with --on; default: as many as it takes.")]
