"""The members of a comparison: one run folder for every arm and seed, each made once."""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import yaml

from atp import processes
from atp.baselines.methods import BASELINES
from atp.compare.baseline_run import BaselineRun
from atp.compare.results import Member
from atp.config import ATPConfig
from atp.errors import InputError, shorten
from atp.files import write_json
from atp.run import Run, check_promises
from atp.training.precision import autocast_dtype

ATP = "atp"
METHODS = (ATP, *BASELINES)


@dataclass(frozen=True)
class Arm:
    """One side of a comparison: a method, and what it changes in the common config ("key.path=value" each).

    Raises `InputError` for an unknown method.
    """

    method: str
    overrides: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            name = shorten(self.method)
            near = difflib.get_close_matches(name, METHODS, n=1, cutoff=0.0)[0]
            raise InputError(f"method '{name}' is unknown: did you mean '{near}'? ({', '.join(METHODS)})")

    @property
    def name(self) -> str:
        """The method, and after commas what differs."""
        return ",".join((self.method, *self.overrides))


class Members:
    """Runs arms with seeds on one common config, in `<arm>-seed<n>/` of a folder.

    The splits are those of the config's seed for all; a seed of the comparison decides the rest: adapter, order of
    samples, generator, calibration windows. A member that is finished is read, one that was interrupted goes on from
    its checkpoint.
    """

    def __init__(self, config: ATPConfig, folder: Path, *, command: str, say: Callable[[str], None] = print) -> None:
        """Raises `InputError` where the folder holds members of another config."""
        self.folder, self.command = folder, command
        self.say = say if processes.is_main() else lambda line: None
        self.config = processes.on_main(lambda: self._common(config))

    def run(self, arm: Arm, seed: int) -> None:
        """Makes the member if it is not there. Raises `InputError`, `Interrupted` and `NotReached`."""
        folder = self.path(arm, seed)
        finished = processes.on_main(lambda: self.read(arm, seed))
        if finished is not None:
            if arm.method == ATP:
                check_promises(finished.summary)
            return
        self.say(f"{arm.name}, seed {seed}")
        config = self.config_of(arm, seed)
        resume = processes.on_main(lambda: self._share_original(folder))
        options = {"resume": resume, "command": self.command, "say": self.say}
        run = Run(config, **options) if arm.method == ATP else BaselineRun(arm.method, config, **options)
        run.execute()

    def read(self, arm: Arm, seed: int) -> Member | None:
        """The member if it is finished."""
        folder = self.path(arm, seed)
        if not (folder / "summary.json").is_file():
            return None
        texts = ((folder / f"{n}.json").read_text(encoding="utf-8") for n in ("summary", "evaluation"))
        return Member(arm.name, seed, *map(json.loads, texts))

    def path(self, arm: Arm, seed: int) -> Path:
        """The run folder of a member. What an arm sets to the common value is no part of its name."""
        values = self.config.model_dump(mode="json")
        telling = tuple(o for o in arm.overrides if ATPConfig.parse(values, [o]) != self.config)
        return self.folder / f"{re.sub(r'[^A-Za-z0-9._=,+-]', '_', Arm(arm.method, telling).name)}-seed{seed}"

    def config_of(self, arm: Arm, seed: int) -> ATPConfig:
        """The config of a member. Raises `InputError` for an override or a seed that does not fit."""
        config = ATPConfig.parse(self.config.model_dump(mode="json"), [*arm.overrides, f"seed={seed}"])
        config.output_dir = str(self.path(arm, seed))
        return config

    def _common(self, config: ATPConfig) -> ATPConfig:
        """The config of all members but for seed and folder; precision is probed once, or two of them might differ."""
        config = config.model_copy(deep=True)
        config.output_dir = str(self.folder)
        config.data.seed = config.seed if config.data.seed is None else config.data.seed
        config.evaluation.dense_baseline = False
        path = self.folder / "comparison.yaml"
        saved = yaml.safe_load(path.read_text(encoding="utf-8")) if path.is_file() else None
        if config.training.precision == "auto":
            probed = "float32" if autocast_dtype("auto") is None else "bfloat16"
            config.training.precision = saved["training"]["precision"] if saved else probed
        if saved:
            config.refuse_change_of(saved)
        else:
            self.folder.mkdir(parents=True, exist_ok=True)
            path.write_text(config.dump(), encoding="utf-8")
        return config

    def _share_original(self, folder: Path) -> bool:
        """Takes the original's scores, the same for all, from the first member that has them.

        Returns whether the member's folder holds anything, so that its run goes on from there.
        """
        if folder.is_dir():
            return any(folder.iterdir())
        for path in sorted(self.folder.glob("*/evaluation.json")):
            scores = json.loads(path.read_text(encoding="utf-8"))
            if "original" in scores:
                folder.mkdir()
                write_json(folder / "evaluation.json", {"original": scores["original"]})
                return True
        return False
