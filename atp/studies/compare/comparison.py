"""A comparison: every method with every seed on one config, and the summary of all."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from atp.config import ATPConfig
from atp.data import Splits, load_recipe
from atp.evaluation.scored_tasks import check_tasks, majority_of, scored_tasks, without_items
from atp.ground.environment import versions
from atp.ground.errors import Interrupted, NotReached
from atp.ground.files import write_json
from atp.ground.signals import SignalGuard
from atp.inputs.folders import COMPARISON, begun_by_this_launch, check_output_dir
from atp.inputs.loading import check_packages, data_settings, load_shapes, load_tokenizer
from atp.inputs.precision import refuse_open
from atp.inputs.targets import in_shares
from atp.processes import processes
from atp.report.beside import perplexity_of
from atp.studies.compare.arms import compared
from atp.studies.compare.members import Members
from atp.studies.compare.page import write_pages
from atp.studies.compare.results import results, unmeasurable
from atp.studies.engines import Engine, Here, carry_out


class Comparison:
    """Runs every method with every seed on one config and updates a table after each run.

    Its folder holds the run folders of the `Members`, comparison.json, .md, .html and, with matplotlib, .png.
    """

    def __init__(
        self,
        config: ATPConfig,
        methods: Sequence[str],
        seeds: Sequence[int],
        folder: Path,
        *,
        resume: bool,
        command: str,
        engine: Engine | None = None,
    ) -> None:
        """engine: what runs the members; by default this process does.

        Raises `InputError` for an unknown method, or without any method or seed."""
        self.arms = compared(methods, seeds)
        self.seeds = list(dict.fromkeys(seeds))
        self.config, self.folder, self.resume, self.command = in_shares(config), folder, resume, command
        self.engine = engine or Here()

    def execute(self) -> dict[str, Any]:
        """Runs what is missing, writes the artifacts after each member, and returns the content of comparison.json.

        Raises `InputError`, `Interrupted`, and at the end `NotReached` if a member broke a promise (its row stays).
        """
        asked = {"--methods": [arm.name for arm in self.arms], "--seeds": self.seeds, "--resume": self.resume}
        processes.start(settings=asked | self.config.model_dump())
        try:
            with SignalGuard(at_once=True):
                return self._execute()
        except Interrupted as error:
            started = (self.folder / COMPARISON).is_file()
            remedy = "continue with --resume" if started else "nothing was written yet, start again"
            raise Interrupted(error.signum, remedy) from None

    def _execute(self) -> dict[str, Any]:
        self.resume = self.resume or processes.on_main(lambda: begun_by_this_launch(self.folder, COMPARISON))
        processes.on_main(lambda: check_output_dir(self.folder, resume=self.resume, started=COMPARISON))
        refuse_open(self.config, self.engine.elsewhere)
        members = Members(self.config, self.folder, command=self.command)
        processes.on_main(lambda: check_packages(members.config.model, members.config.data))
        processes.on_main(lambda: members.check(self.arms, self.seeds))
        tokenizer = processes.main_first(lambda: load_tokenizer(self.config.model))
        splits = processes.main_first(lambda: load_recipe(data_settings(members.config, tokenizer)))
        processes.on_main(lambda: check_tasks(self.config, splits, tokenizer, load_shapes(self.config.model)))
        with members.opened(resume=self.resume):
            return self._carry_out(members, splits)

    def _carry_out(self, members: Members, splits: Splits) -> dict[str, Any]:
        """Runs the members, and rivals after all others, whose time they take."""
        told: dict[str, str] = {}
        content: dict[str, Any] = {}
        broken = []

        def write(found: dict[str, str]) -> dict[str, Any]:
            told.update(found)
            return self._write(members, splits, told)

        for of_rivals in (False, True):
            jobs = [
                members.job(arm, seed, f"{arm.name}, seed {seed}")
                for seed, arm in itertools.product(self.seeds, self.arms)
                if (arm.rival is not None) == of_rivals
            ]
            if not jobs:
                continue
            try:
                content = carry_out(self.engine, jobs, write)
            except NotReached as error:
                broken.append(str(error))
        if broken:
            raise NotReached("; ".join(broken))
        return content

    def _write(self, members: Members, splits: Splits, notes: dict[str, str]) -> dict[str, Any]:
        found = {(arm.name, seed): members.read(arm, seed) for arm in self.arms for seed in self.seeds}
        finished = [member for member in found.values() if member is not None]
        tasks, majority = scored_tasks(self.config, splits), majority_of(self.config, splits)
        content = {
            "target_keep": self.config.decisions.target_keep,
            "methods": results(finished, tasks, majority),
            "perplexity_of": perplexity_of(finished[0].scores["final"]) if finished else {},
            "majority": {name: without_items(scores) for name, scores in majority.items()},
            "not_measurable": unmeasurable(finished, tasks, majority),
            "missing": [f"{name}, seed {seed}" for (name, seed), member in found.items() if member is None],
            "notes": notes,
            "data": splits.fingerprints | {"description": splits.description},
            "versions": versions(),
            "command": self.command,
        }
        write_json(self.folder / "comparison.json", content)
        write_pages(self.folder, content)
        return content
