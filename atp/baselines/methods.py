"""The systems that ATP is compared with: each makes one choice on the pretrained model, which is then applied to it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import cast

from torch import Tensor
from torch.utils.data import Dataset
from transformers import PretrainedConfig, PreTrainedModel

from atp.baselines.disp_llm import disp_mask
from atp.baselines.llm_pruner import taylor_mask
from atp.baselines.masked import refit_readers
from atp.baselines.simple import magnitude_mask, random_mask, static_mask
from atp.baselines.slicegpt import choose_bases, slice_model, sliced_width
from atp.baselines.wanda_sp import wanda_mask
from atp.config import ATPConfig
from atp.ground.errors import InputError
from atp.removal import cut_model
from atp.spaces.space import MaskSpace


@dataclass(frozen=True)
class MaskBaseline:
    """A rule that picks decisions of a mask space; the cut is ATP's own.

    rule: (model, space, calibration, config) -> bool [space.size]. space: the space that the method is defined on,
    None for the config's. searches: whether the rule learns, in `training.search` steps. refits: whether the linears
    that read removed inputs are refitted, as far as the config says.
    """

    rule: Callable[[PreTrainedModel, MaskSpace, Dataset, ATPConfig], Tensor]
    space: str | None = None
    searches: bool = False
    refits: bool = False

    def space_of(self, model: PreTrainedModel, config: ATPConfig) -> MaskSpace:
        """The table of what each decision removes from this model."""
        return MaskSpace.from_config(model.config, self.space or config.decisions.space)

    def check(self, shapes: PretrainedConfig, config: ATPConfig) -> None:
        """Raises `InputError` for a model, given by its config, that the method does not fit."""
        MaskSpace.from_config(shapes, self.space or config.decisions.space)
        if self.searches and not config.training.search:
            raise InputError("disp_llm learns its masks in training.search steps, which are 0: set them")
        if self.searches and config.decisions.uniform:
            raise InputError(f"disp_llm cuts in space {self.space}, without equal layers: leave out decisions.uniform")

    def choose(self, model: PreTrainedModel, calibration: Dataset, config: ATPConfig) -> Tensor:
        """The mask, bool [size of the space]."""
        return self.rule(model, self.space_of(model, config), calibration, config)

    def apply(self, model: PreTrainedModel, choice: Tensor, calibration: Dataset, config: ATPConfig) -> PreTrainedModel:
        """The smaller model, ready to be tuned."""
        space = self.space_of(model, config)
        if self.refits:
            refit_readers(model, space, choice, calibration, config)
        return cast(PreTrainedModel, cut_model(model, space, choice))


class SliceBaseline:
    """SliceGPT: the choice is the bases of the residual stream."""

    def check(self, shapes: PretrainedConfig, config: ATPConfig) -> None:
        """Raises `InputError` for a model, given by its config, that the method does not fit."""
        sliced_width(shapes, config.decisions.target_keep)

    def choose(self, model: PreTrainedModel, calibration: Dataset, config: ATPConfig) -> Tensor:
        """The bases, float32 [2 layers + 1, hidden, width]."""
        return choose_bases(model, calibration, config)

    def apply(self, model: PreTrainedModel, choice: Tensor, calibration: Dataset, config: ATPConfig) -> PreTrainedModel:
        """The smaller model, ready to be tuned."""
        return slice_model(model, choice)


Baseline = MaskBaseline | SliceBaseline

BASELINES: dict[str, Baseline | None] = {
    "dense_lora": None,
    "random": MaskBaseline(random_mask),
    "magnitude": MaskBaseline(magnitude_mask),
    "static": MaskBaseline(static_mask, refits=True),
    "llm_pruner": MaskBaseline(taylor_mask, "kv_group"),
    "llm_pruner_second": MaskBaseline(partial(taylor_mask, order="second"), "kv_group"),
    "llm_pruner_mixed": MaskBaseline(partial(taylor_mask, order="mixed"), "kv_group"),
    "wanda_sp": MaskBaseline(wanda_mask, "kv_group"),
    "slicegpt": SliceBaseline(),
    "disp_llm": MaskBaseline(disp_mask, "disp", searches=True),
    "llm_pruner+refit": MaskBaseline(taylor_mask, "kv_group", refits=True),
    "wanda_sp+refit": MaskBaseline(wanda_mask, "kv_group", refits=True),
}
"""By name; `dense_lora` removes nothing, and `+refit` gives a method of others ATP's refit on top."""
