"""What drives the LoRA part of removed decisions to zero while training: the interface, and doing nothing."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext

from torch import Tensor, nn


class Regularizer:
    """A term weight * R(LoRA of removed decisions) of the LoRA loss (docs/method.md section 4). Here R is 0.

    A LoRA step calls `applied`, `add_gradient` and `after_step` in this order; mask is bool [space.size], True keeps.
    What is returned for the records is a scalar tensor per name: reading it may wait for the device.
    """

    parameters: Sequence[nn.Parameter] = ()
    """What the regularizer trains besides the adapter; a gradient that is not finite here spoils the step too."""

    def applied(self, mask: Tensor, *, sample: bool) -> AbstractContextManager[None]:
        """Changes the forward pass inside a with block, which must hold the backward pass too.

        sample: as in a LoRA step, with noise if there is any; otherwise as in an evaluation.
        """
        return nullcontext()

    def add_gradient(self, mask: Tensor, weight: float) -> dict[str, Tensor]:
        """Adds weight * dR/dLoRA to clipped gradients, before the optimizer step."""
        return {}

    def after_step(self, mask: Tensor, weight: float, skip: Tensor) -> dict[str, Tensor]:
        """Trains `parameters`, after the optimizer step. skip: scalar float32 on the device, 1 for a skipped step."""
        return {}

    def fold(self, mask: Tensor) -> None:
        """Moves into the LoRA factors what the forward pass would otherwise lose at the cut; once per settle step."""

    def state_dict(self) -> dict[str, Tensor]:
        """Everything that the next step depends on."""
        return {}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """The inverse of `state_dict`."""
