"""Decisions that another run made."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import PretrainedConfig

from atp.config import DecisionsConfig
from atp.decide.budget import Budget
from atp.decide.decisions import Decisions
from atp.ground.errors import InputError, shorten
from atp.spaces.space import MaskSpace

FILE = "decisions.safetensors"
"""What a run writes its mask to (docs/export.md)."""
_CLOSE = 0.02  # what the share of the mask may differ from the target by, as for a run's own


class GivenDecisions(Decisions):
    """The mask that was given, at every share."""

    def give(self, mask: Tensor) -> None:
        """Takes the mask, bool [space.size], that `fitted` returns from then on."""
        self.given = mask

    def state(self) -> dict[str, Tensor]:
        return {"given": self.given}

    def load_state(self, tensors: dict[str, Tensor]) -> None:
        if "given" in tensors:  # not yet in a checkpoint of the first step
            self.give(tensors["given"].bool())

    def logits(self) -> Tensor:
        return self.given.to(self.device, torch.float32)

    def fitted(self, share: float) -> Tensor:
        return self.given


def check_given(config: DecisionsConfig, shapes: PretrainedConfig) -> None:
    """Raises what `given_mask` does, if there is a path. shapes: the config of the model."""
    if config.path is not None:
        given_mask(config, MaskSpace.from_config(shapes, config.space))


def given_mask(config: DecisionsConfig, space: MaskSpace) -> Tensor:
    """The mask of `decisions.path`, bool [space.size].

    Raises `InputError` for a run that has none, or one of another space or model, or of another share than the target.
    """
    path = Path(str(config.path)) / FILE
    try:
        with safe_open(path, framework="pt") as file:
            name, mask = (file.metadata() or {}).get("space"), file.get_tensor("mask").bool()
    except (OSError, SafetensorError) as error:
        raise InputError(
            f"decisions.path: {shorten(path)} cannot be read ({shorten(error)}): give the folder of a run that was cut"
        ) from None
    if name != space.name or mask.shape != (space.size,):
        raise InputError(
            f"decisions.path: {shorten(path)} has {mask.numel()} decisions of space {name}, but this model has "
            f"{space.size} of space {space.name}: give a run of the same model and decisions.space"
        )
    share = Budget(space).share(mask)
    if abs(share - config.target_keep) > _CLOSE:
        raise InputError(
            f"decisions.path: {shorten(path)} keeps {share:.3f} of the decoder, but the target is "
            f"{config.target_keep:.3f}: set decisions.target_keep={share:.3f}"
        )
    return mask
