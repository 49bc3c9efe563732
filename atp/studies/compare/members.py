"""The members of a comparison: one run folder per arm and seed, each run once."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

from atp.baselines.methods import BASELINES
from atp.config import ATPConfig
from atp.config.presets import AUTO, PRESETS, merged
from atp.ground.errors import InputError, shorten
from atp.ground.files import read_json, write_json, write_text
from atp.inputs.folders import COMPARISON, CONFIG, INPUTS, opened, refuse_inputs_inside, saved_config
from atp.inputs.loading import check_length, load_shapes, scored_text
from atp.inputs.precision import precision_of
from atp.inputs.promises import check_promises, check_target
from atp.inputs.resolve import in_common
from atp.processes import processes
from atp.run import Run
from atp.studies.compare.arms import ATP, Arm
from atp.studies.compare.baseline_run import BaselineRun
from atp.studies.compare.results import Member, trained_seconds
from atp.studies.compare.rival import RivalRun, check_rival, rival_config
from atp.studies.engines import Job
from atp.training.resume import refuse_other_inputs

_BEHIND_SCORES = (
    "base weights",
    "model config",
    "tokenizer",
    "test data",
)  # behind the original's scores

_PRESET = "preset="
_SEED = "{seed}"  # in decisions.path of an arm: a member of the same seed, by its name here


class Members:
    """Runs arms with seeds on one common config, in `<arm>-seed<n>/` of a folder.

    All use the splits of the config's seed; the seed of a member decides the rest: adapter, order of samples,
    generator, calibration windows. Finished members are read, and interrupted ones resume from their checkpoint.
    """

    def __init__(self, config: ATPConfig, folder: Path, *, command: str) -> None:
        """Raises `InputError` if the folder holds members of another config, or the model or data."""
        self.folder, self.command = folder, command
        self.config = processes.on_main(lambda: self._common(config))

    @contextmanager
    def opened(self, *, resume: bool) -> Iterator[None]:
        """Locks the folder during a with block and saves the common config there. Raises `InputError`."""
        with ExitStack() as held:
            processes.on_main(lambda: self._open(held, resume))
            yield

    def _open(self, held: ExitStack, resume: bool) -> None:
        held.enter_context(opened(self.folder, resume=resume, started=COMPARISON))
        if saved_config(self.folder, COMPARISON) is None:
            write_text(self.folder / COMPARISON, self.config.dump())

    def job(self, arm: Arm, seed: int, name: str) -> Job:
        """The run of a member under a name of the caller's."""
        finished = processes.on_main(lambda: self._finished(arm, seed)) is not None
        return Job(name, partial(self.run, arm, seed), finished)

    def run(self, arm: Arm, seed: int, say: Callable[[str], None] = print) -> None:
        """Runs the member unless it is finished. Raises `InputError`, `Interrupted` and `NotReached`."""
        folder = self.path(arm, seed)
        finished = processes.on_main(lambda: self._finished(arm, seed))
        if finished is not None:
            if arm.method == ATP:
                check_promises(finished.summary)
            return
        if processes.is_main():
            say(f"{arm.name}, seed {seed}")
        config = self.config_of(arm, seed)
        resume = processes.on_main((folder / CONFIG).is_file)
        options: dict[str, Any] = {
            "resume": resume,
            "command": self.command,
            "say": say,
            "original": self._original(arm),
        }
        if arm.rival is not None:
            text = processes.on_main(lambda: scored_text(self.config))
            RivalRun(arm.method, config, text=text, **options).execute()
        else:
            run = Run(config, **options) if arm.method == ATP else BaselineRun(arm.method, config, **options)
            run.execute()

    def _finished(self, arm: Arm, seed: int) -> Member | None:
        """The member if it is finished, report included, or None."""
        return self.read(arm, seed) if (self.path(arm, seed) / "report.html").is_file() else None

    def read(self, arm: Arm, seed: int) -> Member | None:
        """The member if it is finished, or None."""
        folder = self.path(arm, seed)
        summary, scores = read_json(folder / "summary.json"), read_json(folder / "evaluation.json")
        return None if summary is None or scores is None else Member(arm.name, seed, summary, scores)

    def path(self, arm: Arm, seed: int) -> Path:
        """The run folder of a member. Settings equal to the common config are not part of its name."""
        presets = tuple(o for o in arm.overrides if o.startswith(_PRESET) and self._changed([o]) != self.config)
        own, common = self._changed(arm.overrides).model_dump(), self._changed(presets).model_dump()
        telling = tuple(o for o in arm.overrides if o in presets or _value(own, o) != _value(common, o))
        return self.folder / f"{re.sub(r'[^A-Za-z0-9._=,+-]', '_', Arm(arm.method, telling).name)}-seed{seed}"

    def check(self, arms: Iterable[Arm], seeds: Sequence[int]) -> None:
        """Raises `InputError` if one of these members is sure to fail, before the first one runs."""
        for arm in arms:
            config, *_ = [self.config_of(arm, seed) for seed in seeds]
            if arm.rival is not None:
                check_rival(config)
                continue
            shapes = load_shapes(config.model)
            check_length(shapes, config.data.length)
            baseline = BASELINES.get(arm.method)
            if arm.method == ATP:
                check_target(config, shapes)
            elif baseline is not None:
                baseline.check(shapes, config)

    def config_of(self, arm: Arm, seed: int) -> ATPConfig:
        """The config of a member, in which a rival trains as long as the finished ATP member of its seed.

        Raises `InputError` for a bad override or seed.
        """
        config = self._changed((*arm.overrides, f"seed={seed}"))
        if arm.rival is not None:
            ours = self.read(Arm(ATP), seed)
            config = rival_config(config, arm.rival, None if ours is None else trained_seconds(ours.summary))
        config.output_dir = str(self.path(arm, seed))
        if config.decisions.path is not None and _SEED in config.decisions.path:
            config.decisions.path = str(self.folder / config.decisions.path.replace(_SEED, str(seed)))
        return config

    def _changed(self, overrides: Sequence[str]) -> ATPConfig:
        """The common config with overrides on top; a preset among them brings its settings, below the others.

        Raises `InputError` for a bad override, and for a preset where the common config has one already, whose settings
        are its own by now.
        """
        values = self.config.model_dump(mode="json")
        for override in overrides:
            preset = override.removeprefix(_PRESET)
            if preset in (override, self.config.preset):
                continue
            if self.config.preset != AUTO:
                raise InputError(
                    f"an arm sets {shorten(override)}, but the common config has the preset {self.config.preset} "
                    "already: leave it out there"
                )
            values = merged(values, PRESETS.get(preset, {}))
        return ATPConfig.parse(values, list(overrides))

    def _common(self, config: ATPConfig) -> ATPConfig:
        """The config of all members except seed and folder, with one precision for all of them."""
        refuse_inputs_inside(config, self.folder)
        config = config.model_copy(deep=True)
        config.output_dir = str(self.folder)
        config.data.seed = config.seed if config.data.seed is None else config.data.seed
        config.evaluation.dense_baseline = False
        saved = saved_config(self.folder, COMPARISON)
        config = in_common(config, precision_of(self.folder, COMPARISON))
        if saved:
            config.refuse_change_of(saved)
        return config

    def _original(self, arm: Arm) -> Callable[[dict[str, str]], dict[str, Any] | None]:
        """Returns a function that looks for the original model's scores among members with the same inputs.

        It raises `InputError` if the members of this folder come from other inputs.
        """

        def look(inputs: dict[str, str]) -> dict[str, Any] | None:
            own = ("model.", "data.", "vocabulary.")
            if arm.rival is None and not any(override.startswith(own) for override in arm.overrides):
                refuse_other_inputs(read_json(self.folder / INPUTS) or {}, inputs)
                # Members in other processes write it too: one that replaces it first takes the temporary file along.
                with suppress(FileNotFoundError):
                    write_json(self.folder / INPUTS, inputs)
                refuse_other_inputs(read_json(self.folder / INPUTS) or {}, inputs)
            for path in sorted(self.folder.glob(f"*/{INPUTS}")):
                theirs, scores = read_json(path) or {}, read_json(path.with_name("evaluation.json")) or {}
                if "original" in scores and all(theirs.get(name) == inputs[name] for name in _BEHIND_SCORES):
                    return scores["original"]
            return None

        return look


def _value(settings: Any, override: str) -> Any:
    """What the settings hold where the override sets something."""
    for part in override.partition("=")[0].split("."):
        settings = settings.get(part) if isinstance(settings, dict) else None
    return settings
