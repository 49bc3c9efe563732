"""LoRA tuning of a model that stays as it is: the second stage of every two-stage method, and the dense mark."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from peft import PeftModel
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import TrainerCallback, set_seed

from atp.config import ATPConfig
from atp.training import checkpoint as checkpoints
from atp.training.lora_trainer import LoraTrainer
from atp.training.phases import Phases


class LoraTuner(LoraTrainer):
    """Trains the adapter of a PEFT model with ATP's optimizer, samples, loss, precision, guards and checkpoints.

    The number of LoRA steps is that of a whole ATP run (`training.total`), so both see the same samples. folder holds
    metrics.jsonl and checkpoints/; phase names the steps in the records. train_dataset yields dictionaries with
    `input_ids` and `labels` int64 [length], as the datasets of `atp.data` do.
    """

    def __init__(
        self,
        config: ATPConfig,
        model: PeftModel,
        train_dataset: Dataset,
        folder: Path,
        *,
        phase: str = "tune",
        callbacks: Sequence[TrainerCallback] = (),
    ) -> None:
        self.phase = phase
        steps = Phases(search=0, settle=0, tune=config.training.total)
        super().__init__(config, model, train_dataset, folder, steps, phase_of=lambda step: phase, callbacks=callbacks)

    def train(self, resume: bool = False, **_: Any) -> None:
        """Trains to the end, from the newest complete checkpoint if resume is set and there is one.

        Raises `Interrupted` after a signal (with a checkpoint written) and `NotReached` when losses stay non-finite.
        """
        path = self._resume_point(resume)
        set_seed(self.config.seed)  # whatever this process drew before must not matter
        step = 0
        if path is not None:
            state = checkpoints.load(path)
            self._restore(state)
            step = state.step
        if step < self.phases.total:
            with self.signals:
                self._segment(path)
            self._end_on_signal()
        else:
            self._load_from_checkpoint(str(path))

    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        self._counter.count(inputs["tokens"] * self.args.world_size)
        return super().training_step(model, inputs, num_items_in_batch)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:
            self.check_steps()
            logs["tokens_per_second"] = self.clock.rate(self.phase)
            record = {"loss": logs["loss"], "lr": logs["learning_rate"], "tokens_per_second": logs["tokens_per_second"]}
            seconds = sum(self.clock.seconds.values())
            self.metrics.write({"step": self.state.global_step, "phase": self.phase, **record, "seconds": seconds})
        super().log(logs, start_time)
