"""What the targets of a sweep have in common, done once, and the run folders that start from it."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from atp.baselines.tuner import DENSE
from atp.config import ATPConfig
from atp.config.resolved import ResolvedTraining
from atp.ground.errors import InputError
from atp.ground.files import read_json, whole_folder, write_json, write_text
from atp.inputs.folders import CONFIG, INPUTS, LATENCY, RESOLVED, VOCABULARY
from atp.inputs.promises import check_target
from atp.inputs.resolve import resolve
from atp.processes import processes
from atp.run import Run
from atp.studies.sweep.targets import SweepTarget
from atp.training import checkpoint as checkpoints
from atp.training.callbacks import ProgressBar, make_progress
from atp.training.resume import for_target
from atp.training.trainer import ATPTrainer

DONE = "shared.json"
_TAKEN = (INPUTS, VOCABULARY, "evaluation.json", "metrics.jsonl")  # what a target's folder takes over as it is


class SharedRun(Run):
    """The part of a run that no target changes, in a folder of its own.

    The scores of the original model, the tuned dense model if the config asks for it, the open phase, and the saliency
    at its end. shared.json says that all of it is there, and what it took.
    """

    def __init__(self, config: ATPConfig, targets: Sequence[ATPConfig], **options: Any) -> None:
        """config: its target does not matter. targets: the configs of the targets. options: those of `Run`."""
        super().__init__(config, **options)
        self.targets = targets

    def _look(self) -> dict[str, Any] | None:
        """As for a run, but what ends it is shared.json."""
        super()._look()
        return read_json(self.folder / DONE) if self.resume else None

    def _execute(self) -> dict[str, Any]:
        trainer, _, _ = self._trainer()
        self._train(trainer)
        scores = processes.on_main(self._scores)
        tuned = {DENSE: scores[DENSE]["seconds"]} if DENSE in scores else {}
        facts = {"steps": trainer.step, "seconds": trainer.clock.seconds | tuned}
        processes.on_main(lambda: write_json(self.folder / DONE, facts))
        return facts

    def _check(self, summary: dict[str, Any]) -> None:
        """It makes no promise: there is no cut."""

    def _check_model(self, model: PreTrainedModel) -> None:
        for target in self.targets:
            check_target(target, model.config)

    def _train(self, trainer: ATPTrainer) -> None:
        with make_progress() as progress:
            trainer.callbacks.append(ProgressBar(progress, trainer.phases.open))
            self._hand_over(trainer)
            trainer.train_open(resume=self._begun(trainer))


def start_from(shared: Path, target: SweepTarget, command: str) -> None:
    """Makes the target's output_dir a run folder that has come as far as the shared one; it must not exist.

    Raises `InputError` if no checkpoint of the shared folder can be continued under its config.
    """
    root = shared / "checkpoints"
    newest = checkpoints.resume_point(root, say=lambda line: None)
    if newest is None:
        raise InputError(f"{root} holds no checkpoint: remove {shared / DONE} and repeat `{command}` with --resume")
    state = checkpoints.load(newest)
    # What is resolved of the training goes by the data, which the shared part has read.
    training = ResolvedTraining.model_validate(state.meta["config"]["training"])
    config = resolve(target.config.model_copy(update={"training": training}))
    state = for_target(state, config)
    with whole_folder(Path(config.output_dir)) as folder:
        for name in _TAKEN:
            if (shared / name).is_file():
                shutil.copyfile(shared / name, folder / name)
        write_text(folder / CONFIG, target.given.dump())
        write_text(folder / RESOLVED, config.dump())
        if target.latency is not None:
            write_json(folder / LATENCY, target.latency)
        checkpoints.save(folder / "checkpoints", state, keep=1)


def shared_parts(config: ATPConfig) -> str:
    """A sentence on what the targets share, and on what they do not if no step is among it."""
    training, decisions = config.training, resolve(config).decisions
    parts = ["the original model's scores"]
    if config.evaluation.dense_baseline:
        parts.append("the tuned dense model")
    if training.opened:
        parts.append(f"{training.opened} of {training.total} LoRA steps")
    watched = decisions.source == "running" and training.opened > 0
    begun = decisions.source == "learned" and decisions.init == "saliency"
    if decisions.source in ("static", "tuned") or watched or begun:
        parts.append("the saliency")
    line = f"all targets share {', '.join(parts)}"
    return line if training.opened else f"{line}; training.open is 0, so each of them takes all steps itself"
