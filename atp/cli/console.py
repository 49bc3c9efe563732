"""The terminal that the commands print to."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated, Any

import typer
from rich.console import Console, ConsoleOptions, RenderableType
from rich.segment import Segment
from rich.text import Text

from atp.ground import ranks
from atp.ground.ending import OutputClosed
from atp.ground.errors import visible
from atp.ground.redact import redacted


class _Console(Console):
    """Prints foreign text as it is: brackets are no markup, `:x:` is no emoji, and control characters are shown."""

    def __init__(self, **options: Any) -> None:
        super().__init__(markup=False, emoji=False, highlight=False, **options)

    def print(self, *objects: Any, **options: Any) -> None:
        """As rich does; in a file, which has no width, lines of text stay whole and can be searched for."""
        if not self.is_terminal and all(isinstance(item, str) for item in objects):
            options.setdefault("soft_wrap", True)
        super().print(*objects, **options)

    def render_str(self, text: str, **options: Any) -> Text:
        """As rich does, for every text that is printed, cells of tables included; secrets are left out."""
        return super().render_str(visible(redacted(text)), **options)

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        """As rich does; a `Text`, which is no longer a text when it comes here, has no control characters either."""
        for segment in super().render(renderable, options):
            yield segment if segment.control else Segment(visible(segment.text), segment.style)

    def on_broken_pipe(self) -> None:
        raise OutputClosed


console = _Console(quiet=not ranks.is_main())
errors = _Console(stderr=True)
JsonLogs = Annotated[
    bool, typer.Option("--json-logs", help="Write progress to stderr as JSON lines (docs/operate.md).")
]
Quiet = Annotated[bool, typer.Option("--quiet", help="Show no progress, only results and errors.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of errors.")]
On = Annotated[str, typer.Option(help="Execution backend: here, local, slurm or ray (docs/scale.md).")]
Resource = Annotated[list[str] | None, typer.Option(help="Resource of one job, such as gpus_per_node=1; repeatable.")]
AtOnce = Annotated[int | None, typer.Option(min=1, help="Most runs at a time; default: as many as the backend takes.")]
