"""The `atp` command. Errors are one sentence.

Exit codes: 0 done; 1 system error or unexpected failure; 2 bad input; 3 budget, certificate or finite losses not
reached, or another process of the run has ended; 129, 130 and 143 after a signal; 141 when the reader of the output
has gone.
"""

from __future__ import annotations

import logging
import os
import sys
import warnings
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NoReturn

import typer
from rich.box import SIMPLE_HEAD
from rich.table import Table

from atp.cli import results, settings
from atp.cli.console import AtOnce, Debug, JsonLogs, On, Quiet, Resource, console, errors
from atp.ground import progress, ranks
from atp.ground.ending import (
    OutputClosed,
    ending,
    flush_output,
    imports_are_done,
    interrupted,
    open_closed_output,
    show_traceback,
)
from atp.ground.errors import InputError, shorten
from atp.ground.redact import redacted

if TYPE_CHECKING:
    from atp.studies.engines import Engine

app = typer.Typer(
    no_args_is_help=True, pretty_exceptions_enable=False, rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)  # fmt: skip

# Under a launcher, only the main process runs these.
_ONE_PROCESS = (
    "plan", "config", "eval", "export", "chat", "report", "push", "env", "init", "runs", "watch", "frontier",
)  # fmt: skip
_LONG = ("init", "train", "plan", "demo", "eval", "compare", "experiment", "sweep", "frontier", "export", "chat")


def _version(wanted: bool) -> None:
    if wanted:
        from atp_kernels._version import __version__

        print(f"atp {__version__}")
        raise typer.Exit()


@app.callback()
def _root(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Make a language model smaller and better at one domain, in one training run."""
    if context.invoked_subcommand in _ONE_PROCESS:
        if not ranks.is_main():
            raise typer.Exit()
        ranks.leave()
    if context.invoked_subcommand in _LONG and not {"-h", "--help"} & set(sys.argv):
        progress.begin("starting")  # torch takes seconds


@app.command()
def train(
    config: Annotated[Path, typer.Argument(help="YAML config.")],
    overrides: Annotated[list[str] | None, typer.Argument(help="key.path=value, overriding the file.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Resume from the newest complete checkpoint.")] = False,
    profile: Annotated[
        bool, typer.Option("--profile", help="Trace a few steps per phase into the run folder's profile/.")
    ] = False,
    quiet: Quiet = False,
    json_logs: JsonLogs = False,
    debug: Debug = False,
) -> None:
    """Run one stage: tune, decide, cut, tune on, export and score.

    Example: atp train examples/health-mini.yaml decisions.target_keep=0.7 output_dir=runs/seventy
    """
    from atp.inputs.early import load_config

    settings = load_config(config, overrides, resume=resume)

    from atp.report.terminal import show
    from atp.run import Run

    _note()
    run = Run(settings, resume=resume, command=_command(), say=console.print, outlined=True, profile=profile)
    show(run.execute(), console)
    console.print(f"report: {Path(settings.output_dir) / 'report.html'}")


@app.command()
def demo(
    overrides: Annotated[list[str] | None, typer.Argument(help="key.path=value, overriding the demo's.")] = None,
    output_dir: Annotated[Path, typer.Option(help="Run folder.")] = Path("runs/demo"),
    no_dense: Annotated[
        bool, typer.Option("--no-dense", help="Quote recorded scores of the tuned dense model instead of tuning it.")
    ] = False,
    resume: Annotated[bool, typer.Option("--resume", help="Resume from the newest complete checkpoint.")] = False,
    quiet: Quiet = False,
    json_logs: JsonLogs = False,
    debug: Debug = False,
) -> None:
    """Cut 40 % of SmolLM2-135M's decoder and teach it satire from news, on a CPU, without the Hub.

    Example: atp demo decisions.space=head_dim --output-dir runs/head-dim
    """
    from atp.cli.demo import demo_config, recorded_dense
    from atp.inputs.early import check_folder, refuse_places

    settings = demo_config(output_dir, [*(["evaluation.dense_baseline=false"] if no_dense else []), *(overrides or [])])
    refuse_places(settings)
    check_folder(Path(settings.output_dir), resume, "config.yaml")

    from atp.report.terminal import show
    from atp.run import Run

    _note()
    recorded = None if settings.evaluation.dense_baseline else recorded_dense(settings, console.print)
    run = Run(
        settings, resume=resume, recorded_dense=recorded, command=_command(), say=console.print, outlined=True
    )  # fmt: skip
    show(run.execute(), console)
    console.print(f"report: {run.folder / 'report.html'}")


@app.command()
def compare(
    config: Annotated[Path, typer.Argument(help="YAML config.")],
    overrides: Annotated[list[str] | None, typer.Argument(help="key.path=value, overriding the file.")] = None,
    methods: Annotated[str, typer.Option(help="Methods, comma-separated.")] = (
        "dense_lora,atp,static,llm_pruner,slicegpt,random"
    ),
    seeds: Annotated[str, typer.Option(help="Seeds, comma-separated.")] = "0",
    out: Annotated[Path | None, typer.Option(help="Output folder; default: output_dir plus '-compare'.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Resume an interrupted comparison.")] = False,
    on: On = "here",
    resource: Resource = None,
    at_once: AtOnce = None,
    quiet: Quiet = False,
    json_logs: JsonLogs = False,
    debug: Debug = False,
) -> None:
    """Compare ATP with other systems at equal data, training tokens, LoRA and parameter share.

    Example: atp compare examples/health-mini.yaml --methods dense_lora,atp,static,random --seeds 0,1
    """
    from atp.inputs.early import check_folder, load_config
    from atp.studies.compare.arms import compared

    settings, chosen = load_config(config, overrides), _listed(methods)
    drawn = [_whole(seed) for seed in _listed(seeds)]
    folder = out or Path(f"{settings.output_dir}-compare")
    compared(chosen, drawn)
    engine = _engine(on, resource, at_once, folder)
    check_folder(folder, resume, "comparison.yaml")

    from atp.studies.compare import Comparison
    from atp.studies.compare.table import brief, comparison_remarks

    _note()
    comparison = Comparison(settings, chosen, drawn, folder, resume=resume, command=_command(), engine=engine)
    content = comparison.execute()
    head, rows = brief(content)
    shown = Table(title=f"{content['target_keep']:.0%} of the decoder kept", box=SIMPLE_HEAD, pad_edge=False)
    for column, name in enumerate(head):
        shown.add_column(name, justify="right" if column else "left")
    for row in rows:
        shown.add_row(*row)
    console.print(shown)
    for remark in comparison_remarks(content):
        console.print(remark)
    console.print(f"page: {folder / 'comparison.html'}")


@app.command()
def experiment(
    name: Annotated[str, typer.Argument(help="YAML file, or the name of one in experiments/.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(help="key.path=value, overriding the settings of all runs.")
    ] = None,
    domains: Annotated[str, typer.Option(help="Data recipes instead of the file's, comma-separated.")] = "",
    seeds: Annotated[str, typer.Option(help="Seeds instead of the file's, comma-separated.")] = "",
    runs: Annotated[Path, typer.Option(help="Folder of run folders, shared by experiments.")] = Path(
        "runs/experiments"
    ),
    out: Annotated[Path, typer.Option(help="Folder for CSV, JSON and PNG.")] = Path("experiments/results"),
    sealed: Annotated[
        bool,
        typer.Option("--sealed", help="Run nothing, and score finished runs once on the sealed half of the test data."),
    ] = False,
    on: On = "here",
    resource: Resource = None,
    at_once: AtOnce = None,
    quiet: Quiet = False,
    json_logs: JsonLogs = False,
    debug: Debug = False,
) -> None:
    """Answer one question by running its experiment; repeat the command to resume an interrupted one.

    Example: atp experiment stages training.search=60 --domains health-mini
    """
    from atp.studies.experiments.spec import refuse_experiment

    recipes, drawn = _listed(domains), [_whole(seed) for seed in _listed(seeds)]
    engine = _engine(on, resource, at_once, runs)
    refuse_experiment(name, recipes, overrides or [])

    from atp.report.beside import counted
    from atp.report.terminal import with_interval
    from atp.studies.experiments import Experiment

    _note()
    question = Experiment(
        name, overrides or [], runs=runs, out=out, domains=recipes, seeds=drawn, command=_command(), engine=engine,
        sealed=sealed,
    )  # fmt: skip
    content = question.execute()
    shown = Table("arm", *content["domains"], title=f"{content['question']} Perplexity:")
    for label in dict.fromkeys(label for found in content["domains"].values() for label in found):
        figures = [found[label]["scores"]["perplexity"] for found in content["domains"].values()]
        shown.add_row(label, *(with_interval(f["value"], f["interval"], digits=2) for f in figures))
    console.print(shown)
    for domain, protocol in content["perplexity_of"].items():
        for line in counted(protocol):
            console.print(f"{domain}: {line}")
    console.print(f"results: {out / question.name}.csv, .json and .png")


@app.command()
def sweep(
    config: Annotated[Path, typer.Argument(help="YAML config.")],
    overrides: Annotated[list[str] | None, typer.Argument(help="key.path=value, overriding the file.")] = None,
    keep: Annotated[str | None, typer.Option(help="Shares of the decoder to keep; default: 0.8,0.7,0.6,0.5.")] = None,
    params: Annotated[
        str | None, typer.Option(help="Parameter counts of the whole cut model, such as 110M,90M.")
    ] = None,
    megabytes: Annotated[str | None, typer.Option(help="Sizes of its weights in 10^6 bytes, in model.dtype.")] = None,
    prefill_ms: Annotated[
        str | None, typer.Option(help="Latencies of a prompt of 256 tokens on this device, in ms.")
    ] = None,
    decode_ms: Annotated[
        str | None, typer.Option(help="Latencies of one new token after 256 on this device, in ms.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Output folder; default: output_dir plus '-sweep'.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Resume an interrupted sweep, or add targets.")] = False,
    on: On = "here",
    resource: Resource = None,
    at_once: AtOnce = None,
    quiet: Quiet = False,
    json_logs: JsonLogs = False,
    debug: Debug = False,
) -> None:
    """Run several targets from one open phase, and plot quality against size.

    Example: atp sweep examples/health-mini.yaml --keep 0.8,0.7,0.6,0.5
    """
    from atp.inputs.early import check_folder, load_config
    from atp.studies.sweep.units import UNITS, refuse_targets

    settings = load_config(config, overrides)
    folder = out or Path(f"{settings.output_dir}-sweep")
    texts = (keep, params, megabytes, prefill_ms, decode_ms)
    given = [(unit, text) for unit, text in zip(UNITS, texts, strict=True) if text is not None]
    asked = [one for unit, text in given or [(UNITS[0], "0.8,0.7,0.6,0.5")] for one in unit.parse(text)]
    refuse_targets(asked)
    engine = _engine(on, resource, at_once, folder)
    check_folder(folder, resume, "sweep.yaml")

    from atp.studies.sweep import Sweep
    from atp.studies.sweep.table import show

    _note()
    found = Sweep(settings, asked, folder, resume=resume, command=_command(), engine=engine).execute()
    show(found, console)
    console.print(f"results: {folder / 'sweep'}.csv, .json and .png")


@app.command()
def frontier(
    sources: Annotated[
        list[str], typer.Argument(metavar="RUN...", help="Finished run folders; also model folders and GGUF files.")
    ],
    out: Annotated[Path | None, typer.Option(help="Output folder; default: the first run plus '-frontier'.")] = None,
    threads: Annotated[int, typer.Option(min=1, help="Threads of llama.cpp.")] = 1,
    quiet: Quiet = False,
    json_logs: JsonLogs = False,
    debug: Debug = False,
) -> None:
    """Score and time models in 16, 8 and 4 bits over their size; repeat the command to go on with it.

    Example: atp frontier runs/demo --out runs/demo-frontier
    """
    from atp.studies.frontier import frontier as measure
    from atp.studies.frontier_table import table

    folder = out or Path(f"{sources[0].rstrip('/')}-frontier")
    rows, said = measure(sources, folder, threads=threads, say=console.print)
    head, lines = table(rows)
    shown = Table(box=SIMPLE_HEAD, pad_edge=False)
    for column, name in enumerate(head):
        shown.add_column(name, justify="right" if column else "left")
    for line in lines:
        shown.add_row(*(cell.partition(" (")[0] if place else cell for place, cell in enumerate(line)))
    console.print(shown)
    for sentence in said:
        console.print(sentence)
    console.print(f"results: {folder / 'frontier'}.csv, .md and .png")


app.add_typer(settings.config, name="config")

app.command()(settings.init)
app.command()(settings.plan)
app.command("eval")(results.evaluate)
for command in (results.runs, results.watch, results.report, results.export, results.chat, results.push, results.env):
    app.command()(command)


def main() -> None:
    """Entry point: every failure ends in one sentence and an exit code; --debug shows the traceback."""
    imports_are_done()
    open_closed_output()
    as_json, quiet, json_result = (option in sys.argv for option in ("--json-logs", "--quiet", "--json"))
    stdout_taken = json_result or sys.argv[1:2] == ["chat"]  # whose stdout holds answers alone
    with progress.logged(as_json, console=console, quiet=quiet, stdout_taken=stdout_taken):
        _run(debug="--debug" in sys.argv)


def _run(debug: bool) -> NoReturn:
    if not debug:
        # Libraries' progress bars and notices would break up our own.
        warnings.simplefilter("ignore")
        logging.disable(logging.WARNING)
        _quiet_transformers()
    try:
        code = app(standalone_mode=False, prog_name="atp") or 0
        sys.stdout.flush()
        sentence = interrupted()[0] if code == interrupted()[1] else ""
    except SystemExit:
        raise
    except BaseException as error:  # Interrupted is no Exception, nor is a panic of the tokenizers' Rust code
        if type(error).__name__ == "NoArgsIsHelpError" and hasattr(error, "show"):  # `atp` alone
            error.show()
            sys.exit(2)
        sentence, code = ending(error)
        sentence = redacted(sentence)
        if debug and sentence:
            sys.excepthook = show_traceback
            raise
        if ranks.count() > 1 and _told_by_main(error):
            sentence = ""
    with suppress(OutputClosed, OSError):  # nobody reads errors either
        if sentence and not progress.error(sentence):
            where = "" if ranks.is_main() else f"process {ranks.rank()}: "
            errors.print(f"{where}error: {sentence}", soft_wrap=True)
    flush_output()
    sys.exit(code)


def _quiet_transformers() -> None:
    # What it reads when it is imported, for which the command's help does not wait.
    os.environ |= {"TRANSFORMERS_VERBOSITY": "error", "HF_HUB_DISABLE_PROGRESS_BARS": "1", "TQDM_DISABLE": "1"}
    os.environ["RUST_BACKTRACE"] = "0"  # of a tokenizer that fails, 18 kB before our sentence
    if (imported := sys.modules.get("transformers")) is not None:
        imported.utils.logging.set_verbosity_error()
        imported.utils.logging.disable_progress_bar()


def _told_by_main(error: BaseException) -> bool:
    from atp.processes import processes

    return processes.told_by_main(error)


def _note() -> None:
    """Tells before a long run why kernels are slow."""
    from atp.ground.environment import slow_kernels

    if reason := slow_kernels():
        console.print(f"slow kernels: {reason} (ATP_BUILD=0 silences this)")


def _engine(on: str, resources: list[str] | None, at_once: int | None, folder: Path) -> Engine:
    from atp.studies.engines import choose

    return choose(on, resources or [], at_once, folder / "jobs", console.print)


def _listed(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]


def _whole(text: str) -> int:
    if not (text.isdecimal() and len(text) < 11 and int(text) < 2**32):
        raise InputError(f"seed '{shorten(text)}' is not an integer below 2^32: use for example --seeds 0,1")
    return int(text)


def _command() -> str:
    return redacted(" ".join(["atp", *sys.argv[1:]]))
