"""LoRA tuning of a model that keeps its shapes: the second stage of every two-stage method, and the dense mark."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch
from peft import PeftModel, get_peft_model
from torch import nn
from torch.utils.data import Dataset
from transformers import PreTrainedModel, set_seed

from atp.config import ATPConfig
from atp.families import FAMILIES, family_name, family_of, layer_config
from atp.ground.errors import InputError
from atp.lora.layer import lora_config
from atp.training import checkpoint as checkpoints
from atp.training.callbacks import Callback
from atp.training.loop import Loop
from atp.training.schedule import Phases
from atp.training.steps import tune_step

DENSE = "dense_lora"  # the 100 % mark: phase in the records, folder, and key in scores


def stock_lora(model: PreTrainedModel, config: ATPConfig) -> PeftModel:
    """Wraps the model in PEFT's own layers, initialized from the run's seed; `unload()` returns the model.

    Of an unknown family all linears but the head get LoRA. Raises `InputError` if it has none.
    """
    if family_name(model.config.model_type) in FAMILIES:
        linears = family_of(model.config).linears(layer_config(model.config, 0))
        names = [name for name, linear in linears.items() if linear.lora]
    else:
        head = model.get_output_embeddings()
        names = [n for n, part in model.named_modules() if isinstance(part, nn.Linear) and part is not head]
    if not names:
        raise InputError(f"a model of family '{model.config.model_type}' has no linears that LoRA could adapt: leave "
                         "it out")  # fmt: skip
    torch.manual_seed(config.seed)
    return get_peft_model(model, lora_config(names, **config.lora.model_dump()))


class LoraTuner(Loop):
    """Tune steps alone, with ATP's optimizer, samples, loss, precision, guards and checkpoints.

    The number of LoRA steps is that of a whole ATP run (`training.total`), so both see the same samples. folder holds
    metrics.jsonl and checkpoints/; name is the phase in the records. train_dataset yields dictionaries with
    `input_ids` and `labels` int64 [length], as the datasets of `atp.data` do.
    """

    def __init__(
        self,
        config: ATPConfig,
        model: PeftModel,
        train_dataset: Dataset,
        folder: Path,
        *,
        validation: Dataset | None = None,
        name: str = "tune",
        callbacks: Sequence[Callback] = (),
    ) -> None:
        steps = Phases(search=0, settle=0, tune=config.training.total)
        super().__init__(config, model, train_dataset, folder, steps, validation=validation, callbacks=callbacks)
        self.name = name

    def train(self, resume: bool = False) -> None:
        """Trains to the end, from the newest complete checkpoint if resume is set and there is one.

        Raises `Interrupted` after a signal (with a checkpoint written) and `NotReached` when losses stay non-finite.
        """
        path = self.resume_point(resume)
        set_seed(self.config.seed)  # whatever this process drew before must not matter
        if path is not None:
            state = checkpoints.load(path)
            self.refuse_other_run(state)
            self.load(state)
        with self.session():
            self.run(self.name, partial(tune_step, self), until=self.phases.total)
            self.take_best()
