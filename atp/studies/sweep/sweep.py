"""A sweep: one open phase, a run per target that goes on from it, and results that grow with them."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

from atp.config import ATPConfig, DecisionsConfig
from atp.ground.environment import device_name, versions
from atp.ground.errors import InputError, Interrupted
from atp.ground.files import read_json, write_csv, write_json, write_text
from atp.ground.signals import SignalGuard
from atp.inputs.folders import (
    CONFIG,
    begun_by_this_launch,
    check_output_dir,
    opened,
    refuse_inputs_inside,
    saved_config,
)
from atp.inputs.loading import check_packages, load_shapes
from atp.inputs.precision import precision_of, refuse_open
from atp.inputs.promises import check_target
from atp.inputs.resolve import in_common
from atp.inputs.targets import at_share
from atp.processes import processes
from atp.run import Run
from atp.studies.engines import Engine, Here, Job, Say, carry_out
from atp.studies.sweep.shared import DONE, SharedRun, shared_parts, start_from
from atp.studies.sweep.table import CsvRow, draw, recommend, target_row, uncut_rows
from atp.studies.sweep.targets import SweepTarget, targets_of
from atp.studies.sweep.units import Asked, refuse_targets

SWEEP, SHARED = "sweep.yaml", "shared"
_NO_TARGET = DecisionsConfig.model_fields["target_keep"].default  # of what is shared: no target is used there


class Sweep:
    """Runs a config with several targets and writes sweep.csv, .json and, with matplotlib, .png.

    Its folder holds `shared`, the run of what the targets have in common, and per target a run folder, keep-0.8 or
    params-90000000, the same as that of a run of its own. Finished targets are left as they are; more can be added on
    resume.
    """

    def __init__(
        self,
        config: ATPConfig,
        asked: Sequence[Asked],
        folder: Path,
        *,
        resume: bool,
        command: str,
        engine: Engine | None = None,
    ) -> None:
        """asked: the targets, in any units; they replace the target of the config. engine: what runs the runs.

        Raises `InputError` without any, or for one that is given twice.
        """
        refuse_targets(asked)
        self.asked, self.folder, self.resume, self.command = asked, folder, resume, command
        self.engine = engine or Here()
        self.config = config

    def execute(self) -> dict[str, Any]:
        """Runs what is missing, writes the results after each target, and returns the content of sweep.json.

        Raises `InputError`, `Interrupted`, and at the end `NotReached` if a target broke a promise (its row stays).
        """
        targets = [one.text for one in self.asked]
        processes.start(settings={"targets": targets, "--resume": self.resume} | self.config.model_dump())
        try:
            with SignalGuard(at_once=True), ExitStack() as held:
                return self._execute(held)
        except Interrupted as error:
            started = (self.folder / SWEEP).is_file()
            remedy = "continue with --resume" if started else "nothing was written yet, start again"
            raise Interrupted(error.signum, remedy) from None

    def _execute(self, held: ExitStack) -> dict[str, Any]:
        self.resume = self.resume or processes.on_main(lambda: begun_by_this_launch(self.folder, SWEEP))
        refuse_open(self.config, self.engine.elsewhere)
        known = processes.on_main(lambda: precision_of(self.folder, SWEEP))
        self.config = in_common(at_share(_placed(self.config, self.folder), _NO_TARGET), known)
        self.common = _placed(self.config, self.folder / SHARED)
        targets = processes.on_main(self._check)
        processes.on_main(lambda: self._open(held))
        shared = self._share([target.config for target in targets])
        jobs = [self._job(target) for target in targets]
        return carry_out(self.engine, jobs, lambda broken: self._write(targets, shared, broken))

    def _check(self) -> list[SweepTarget]:
        """Refuses what is sure to fail, for all targets, before anything is written; returns them."""
        check_output_dir(self.folder, resume=self.resume, started=SWEEP)
        saved = saved_config(self.folder, SWEEP)
        if saved is not None:
            self.common.refuse_change_of(saved)
        check_packages(self.common.model, self.common.data)
        refuse_inputs_inside(self.common, Path(self.common.output_dir))
        shapes = load_shapes(self.common.model)
        timed = next((one for one in self.asked if one.unit.option.endswith("-ms")), None)
        if timed is not None and self.engine.elsewhere:
            raise InputError(
                f"--{timed.text} would be measured on this machine, not on those that run: use another unit"
            )
        targets = targets_of(self.config, self.asked, self.folder)
        for target in targets:
            refuse_inputs_inside(target.config, Path(target.config.output_dir))
            check_target(target.config, shapes)
        return targets

    def _open(self, held: ExitStack) -> None:
        held.enter_context(opened(self.folder, resume=self.resume, started=SWEEP))
        if saved_config(self.folder, SWEEP) is None:
            write_text(self.folder / SWEEP, self.common.dump())

    def _share(self, configs: list[ATPConfig]) -> dict[str, Any]:
        """Does what the targets have in common, and returns the content of shared.json."""
        done = Path(self.common.output_dir) / DONE
        work = partial(_share, self.common, configs, self.command)
        job = Job(shared_parts(self.common), work, processes.on_main(done.is_file))
        carry_out(self.engine, [job], lambda broken: {})
        return processes.on_main(lambda: read_json(done)) or {}

    def _job(self, target: SweepTarget) -> Job:
        finished = processes.on_main((Path(target.given.output_dir) / "report.html").is_file)
        return Job(target.asked.text, partial(_reach, self.folder / SHARED, target, self.command), finished)

    def _write(self, targets: list[SweepTarget], shared: dict[str, Any], broken: dict[str, str]) -> dict[str, Any]:
        found = [(target, read_json(Path(target.config.output_dir) / "summary.json")) for target in targets]
        finished = [(target, summary) for target, summary in found if summary is not None]
        rows: list[CsvRow] = []
        for target, summary in finished:
            rows = rows or uncut_rows(summary)
            rows.append(target_row(target, summary, shared))
        scores = {t.asked.text: read_json(Path(t.config.output_dir) / "evaluation.json") or {} for t, _ in finished}
        tasks = finished[0][1]["tasks"] if finished else []
        content = {
            "recommended": recommend(rows, scores, tasks, self.common.seed) if finished else None,
            "rows": rows,
            "perplexity_of": next((summary.get("perplexity_of", {}) for _, summary in finished), {}),
            "shared": shared | {"what": shared_parts(self.common)},
            "missing": [target.asked.text for target, summary in found if summary is None],
            "notes": broken,
            "seed": self.common.seed,
            "data": next((summary["data"] for _, summary in finished), {}),
            "device": device_name(),
            "versions": versions(),
            "command": self.command,
        }
        write_csv(self.folder / "sweep.csv", rows)
        write_json(self.folder / "sweep.json", content)
        draw(self.folder / "sweep.png", rows, self.common.data.recipe)
        return content


def _share(config: ATPConfig, targets: list[ATPConfig], command: str, say: Say) -> None:
    if processes.is_main():
        say(shared_parts(config))
    resume = processes.on_main((Path(config.output_dir) / CONFIG).is_file)
    SharedRun(config, targets, resume=resume, command=command, say=say).execute()


def _reach(shared: Path, target: SweepTarget, command: str, say: Say) -> None:
    if processes.is_main():
        say(target.asked.text)
    processes.on_main(lambda: _begin(shared, target, command))
    Run(target.given, resume=True, command=command, say=say).execute()


def _begin(shared: Path, target: SweepTarget, command: str) -> None:
    if not Path(target.config.output_dir).exists():
        start_from(shared, target, command)


def _placed(config: ATPConfig, folder: Path) -> ATPConfig:
    return config.model_copy(update={"output_dir": str(folder)})
