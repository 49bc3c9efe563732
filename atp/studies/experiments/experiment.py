"""An experiment: its runs, and a record that grows after each of them."""

from __future__ import annotations

import itertools
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any

from atp.config import ATPConfig
from atp.data import Task, load_recipe
from atp.evaluation.scored_tasks import check_tasks, majority_of, scored_tasks, without_items
from atp.ground.environment import device_name, versions
from atp.ground.errors import Interrupted
from atp.ground.files import check_writable, write_json
from atp.ground.signals import SignalGuard
from atp.inputs.folders import COMPARISON
from atp.inputs.loading import check_packages, data_settings, load_shapes, load_tokenizer
from atp.inputs.precision import refuse_open
from atp.inputs.targets import in_shares
from atp.processes import processes
from atp.report.beside import perplexity_of
from atp.studies.compare.arms import Arm
from atp.studies.compare.members import Members
from atp.studies.compare.results import Member, results, unmeasurable
from atp.studies.engines import Engine, Here, Job, carry_out
from atp.studies.experiments.pictures import draw
from atp.studies.experiments.rows import append_rows, member_row
from atp.studies.experiments.sealed import SEALED, Sealed, sealed
from atp.studies.experiments.spec import ExperimentSpec
from atp.training.schedule import Phases


class Experiment:
    """Runs an experiment file and writes NAME.csv, NAME.json and NAME.png to a results folder.

    Run folders are `runs`/DOMAIN/ARM-seedN, shared by all experiments with the same settings: a run that one of them
    finished is read by the others. Repeating a call resumes where the last one stopped.
    """

    def __init__(
        self,
        name: str,
        overrides: list[str],
        *,
        runs: Path,
        out: Path,
        domains: list[str] | None = None,
        seeds: list[int] | None = None,
        command: str,
        engine: Engine | None = None,
        sealed: bool = False,
    ) -> None:
        """domains and seeds replace those of the file. engine: what runs the runs; by default this process does.

        sealed: runs nothing, but scores finished runs on the sealed half of the test data, each once, for
        NAME-sealed.csv. Raises `InputError` if the file is not valid.
        """
        self.spec, path = ExperimentSpec.load(name)
        self.name, self.runs, self.out, self.command = path.stem + "-sealed" * sealed, runs, out, command
        self.engine, self.sealed = engine or Here(), Sealed() if sealed else None
        self.arms = self.spec.labelled_arms()
        self.seeds = seeds or self.spec.seeds
        self.configs = {
            domain: in_shares(self.spec.config(path, domain, overrides)) for domain in domains or self.spec.domains
        }

    def execute(self) -> dict[str, Any]:
        """Runs what is missing and returns the content of NAME.json.

        Raises `InputError`, `Interrupted`, and at the end `NotReached` if a run broke a promise (its row stays).
        """
        configs = {domain: config.model_dump() for domain, config in self.configs.items()}
        asked = {"experiment": self.name, "arms": list(self.arms), "--domains": list(configs), "--seeds": self.seeds}
        processes.start(settings=asked | configs)
        processes.on_main(self._check_places)
        try:
            with SignalGuard(at_once=True):
                return self._execute()
        except Interrupted as error:
            raise Interrupted(error.signum, "repeat the command to resume") from None

    def _execute(self) -> dict[str, Any]:
        for config in self.configs.values():
            refuse_open(config, self.engine.elsewhere)
        self._members = {d: Members(c, self.runs / d, command=self.command) for d, c in self.configs.items()}
        processes.on_main(self._check_members)
        self._splits = processes.main_first(
            lambda: {
                domain: load_recipe(data_settings(self._scored(members.config), load_tokenizer(members.config.model)))
                for domain, members in self._members.items()
            }
        )
        processes.on_main(self._check_tasks)
        if self.sealed is not None:
            return processes.on_main(lambda: self._write({}))
        with ExitStack() as folders:
            for members in self._members.values():
                resume = processes.on_main((members.folder / COMPARISON).exists)
                folders.enter_context(members.opened(resume=resume))
            jobs: dict[Path, Job] = {}  # two arms with the same settings are one run
            for seed, (domain, members), (label, arm) in itertools.product(
                self.seeds, self._members.items(), self.arms.items()
            ):
                name = f"{domain}, {label}, seed {seed}"
                jobs.setdefault(members.path(arm, seed), members.job(arm, seed, name))
            return carry_out(self.engine, list(jobs.values()), self._write)

    def _check_members(self) -> None:
        for config in self.configs.values():
            check_packages(config.model, config.data)
        for members in self._members.values():
            members.check(self.arms.values(), self.seeds)

    def _check_tasks(self) -> None:
        for domain, config in self.configs.items():
            check_tasks(config, self._splits[domain], load_tokenizer(config.model), load_shapes(config.model))

    def _check_places(self) -> None:
        check_writable(self.runs, "--runs")
        check_writable(self.out, "--out")

    def _write(self, broken: dict[str, str]) -> dict[str, Any]:
        self.out.mkdir(parents=True, exist_ok=True)
        rows, missing, domains = [], [], {}
        majority = {domain: majority_of(config, self._splits[domain]) for domain, config in self.configs.items()}
        not_measurable, counted = {}, {}
        for domain, members in self._members.items():
            found = self._finished(members)
            missing += [f"{domain}, {label}, seed {seed}" for (label, seed), member in found.items() if member is None]
            finished = {key: member for key, member in found.items() if member is not None}
            compared = self._by_label(finished), self._tasks(domain), majority[domain]
            counted[domain] = next((perplexity_of(m.scores["final"]) for m in finished.values()), {})
            domains[domain], not_measurable[domain] = results(*compared), unmeasurable(*compared)
            for (label, seed), member in finished.items():
                folder = members.path(self.arms[label], seed)
                finished_in = "summary.json" if self.sealed is None else SEALED
                row = member_row(member, folder, self._tasks(domain), members.config, majority[domain], finished_in)
                rows.append({"experiment": self.name, "domain": domain, "arm": label, "seed": seed} | row)
        content = {
            "question": self.spec.question,
            "steps": asdict(Phases.from_config(next(iter(self.configs.values())).training)),
            "domains": domains,
            "perplexity_of": counted,
            "majority": {d: {task: without_items(s) for task, s in found.items()} for d, found in majority.items()},
            "not_measurable": not_measurable,
            "missing": missing,
            "notes": [f"{name}: {reason}" for name, reason in broken.items()],
            "device": device_name(),
            "versions": versions(),
            "command": self.command,
        }
        append_rows(self.out / f"{self.name}.csv", rows)
        write_json(self.out / f"{self.name}.json", content)
        paths = {
            d: {label: m.path(arm, self.seeds[0]) for label, arm in self.arms.items()} for d, m in self._members.items()
        }
        draw(self.out / f"{self.name}.png", self.spec, domains, self.arms, paths)
        return content

    def _finished(self, members: Members) -> dict[tuple[str, int], Member | None]:
        return {
            (label, seed): self._read(members, arm, seed) for label, arm in self.arms.items() for seed in self.seeds
        }

    def _read(self, members: Members, arm: Arm, seed: int) -> Member | None:
        member = members.read(arm, seed)
        return member if member is None or self.sealed is None else self.sealed.member(members.path(arm, seed), member)

    def _scored(self, config: ATPConfig) -> ATPConfig:
        """The settings with the half of the test data that is scored."""
        return config if self.sealed is None else sealed(config)

    def _by_label(self, finished: dict[tuple[str, int], Member]) -> list[Member]:
        return [Member(label, seed, m.summary, m.scores) for (label, seed), m in finished.items()]

    def _tasks(self, domain: str) -> list[Task]:
        return scored_tasks(self.configs[domain], self._splits[domain])
