"""The mode in which an evaluation runs a model: no gradients, eval mode, optional autocast, all restored afterwards."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import rich.progress
import torch
from peft import PeftModel
from torch import nn
from transformers import PreTrainedModel

from atp.ground import progress

CausalLM = PreTrainedModel | PeftModel
"""A causal LM, plain or wrapped by PEFT."""

Progress = Callable[[int, int], None]
"""Called with (done, total) after each batch."""


def bars(display: rich.progress.Progress, title: str) -> Callable[[str], Progress]:
    """Gives each named part of an evaluation its own progress bar on the display."""

    def add(part: str) -> Progress:
        bar = display.add_task(f"{title}: {part}", total=None)
        progress.begin(f"{title}: {part}")

        def show(done: int, total: int) -> None:
            display.update(bar, completed=done, total=total)
            progress.count(done, total)

        return show

    return add


@contextmanager
def inference(model: nn.Module, autocast: torch.dtype | None = None) -> Iterator[torch.device]:
    """Yields the model's device inside a no-grad, eval-mode, autocast (if a dtype is given) context.

    Restores the training flag of every module, since parts of the model may be in different modes.
    """
    modes = [(module, module.training) for module in model.modules()]
    device = next(model.parameters()).device
    model.eval()
    try:
        # no_grad rather than inference_mode: what a model caches here must stay usable in training.
        with torch.no_grad(), torch.autocast(device.type, dtype=autocast, enabled=autocast is not None):
            yield device
    finally:
        for module, training in modes:
            module.training = training


def cache_name(model: nn.Module) -> str:
    """What the model calls the keys and values that it takes and returns: transformers renamed them in 5.24."""
    return "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"
