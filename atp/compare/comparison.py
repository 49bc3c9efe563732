"""A comparison: one run folder for every method and seed, and what they add up to."""

from __future__ import annotations

import difflib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import yaml

from atp.baselines.methods import BASELINES
from atp.compare.baseline_run import BaselineRun
from atp.compare.page import write_pages
from atp.compare.results import Member, results
from atp.config import ATPConfig
from atp.data import Splits, load_recipe
from atp.environment import versions
from atp.errors import InputError, NotReached
from atp.export.hf import write_json
from atp.loading import check_output_dir, data_settings, load_tokenizer
from atp.run import Run, check_promises, scored_tasks
from atp.training.precision import autocast_dtype

ATP = "atp"
METHODS = (ATP, *BASELINES)


class Comparison:
    """Runs every method with every seed on one config and keeps a table of what is there so far.

    The splits are those of the config's seed for all; a seed of the comparison decides the rest: adapter, order of
    samples, generator, calibration windows. Folder: `<method>-seed<n>/` (a run folder each), comparison.json, .md,
    .html and, with matplotlib, .png. A member that is finished is read, one that was interrupted goes on from its
    checkpoint.
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
        say: Callable[[str], None] = print,
    ) -> None:
        """Raises `InputError` for an unknown method, or when there is none, or no seed."""
        for method in methods:
            if method not in METHODS:
                near = difflib.get_close_matches(method, METHODS, n=1, cutoff=0.0)[0]
                raise InputError(f"method '{method}' is unknown: did you mean '{near}'? ({', '.join(METHODS)})")
        if not methods or not seeds:
            raise InputError("nothing to compare: give at least one method and one seed")
        self.methods, self.seeds = list(dict.fromkeys(methods)), list(dict.fromkeys(seeds))
        self.config, self.folder, self.resume, self.command, self.say = config, folder, resume, command, say

    def execute(self) -> dict[str, Any]:
        """Runs what is missing, writes the artifacts after each member, and returns the content of comparison.json.

        Raises `InputError`, `Interrupted`, and at the end `NotReached` when a member kept no promise (its row stays).
        """
        check_output_dir(self.folder, resume=self.resume)
        config = self._common_config()
        splits = load_recipe(data_settings(config, load_tokenizer(config.model)))
        broken: dict[str, str] = {}
        content: dict[str, Any] = {}
        for seed in self.seeds:
            for method in self.methods:
                try:
                    self._run(method, seed, config)
                except NotReached as error:
                    broken[f"{method}, seed {seed}"] = str(error)
                content = self._write(splits, broken)
        if broken:
            raise NotReached("; ".join(f"{name}: {reason}" for name, reason in broken.items()))
        return content

    def _common_config(self) -> ATPConfig:
        """The config of all members but for seed and folder; precision is probed once, or two of them might differ."""
        config = self.config.model_copy(deep=True)
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

    def _run(self, method: str, seed: int, common: ATPConfig) -> None:
        folder = self.folder / f"{method}-seed{seed}"
        if (folder / "summary.json").is_file():
            if method == ATP:
                check_promises(json.loads((folder / "summary.json").read_text(encoding="utf-8")))
            return
        self.say(f"{method}, seed {seed}")
        self._share_original(folder)
        config = common.model_copy(deep=True)
        config.seed, config.output_dir = seed, str(folder)
        options = {"resume": folder.is_dir() and any(folder.iterdir()), "command": self.command, "say": self.say}
        run = Run(config, **options) if method == ATP else BaselineRun(method, config, **options)
        run.execute()

    def _share_original(self, folder: Path) -> None:
        """The original's scores are the same for all: taken from the first member that has them."""
        if folder.is_dir():
            return
        for path in sorted(self.folder.glob("*/evaluation.json")):
            scores = json.loads(path.read_text(encoding="utf-8"))
            if "original" in scores:
                folder.mkdir()
                write_json(folder / "evaluation.json", {"original": scores["original"]})
                return

    def _members(self) -> list[Member]:
        """The finished members, method by method."""
        found = []
        for method in self.methods:
            for seed in self.seeds:
                folder = self.folder / f"{method}-seed{seed}"
                if (folder / "summary.json").is_file():
                    texts = ((folder / f"{n}.json").read_text(encoding="utf-8") for n in ("summary", "evaluation"))
                    summary, scores = map(json.loads, texts)
                    found.append(Member(method, seed, summary, scores))
        return found

    def _write(self, splits: Splits, notes: dict[str, str]) -> dict[str, Any]:
        members = self._members()
        content = {
            "target_keep": self.config.decisions.target_keep,
            "methods": results(members, scored_tasks(self.config, splits)),
            "missing": [
                f"{method}, seed {seed}"
                for method in self.methods
                for seed in self.seeds
                if (method, seed) not in {(m.method, m.seed) for m in members}
            ],
            "notes": notes,
            "data": splits.fingerprints | {"description": splits.description},
            "versions": versions(),
            "command": self.command,
        }
        write_json(self.folder / "comparison.json", content)
        write_pages(self.folder, content)
        return content
