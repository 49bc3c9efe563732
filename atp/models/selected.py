"""Blocks that see a part of the residual stream, which keeps its width (DISP-LLM, arXiv 2410.11988)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from atp.models.layers import add_block, residual_multiplier


class Indexed(nn.Module):
    """A module with positions that no file holds, as buffers: they are in the config."""

    def indices(self) -> dict[str, Tensor | None]:
        """The buffers, int64 [positions] or None, by their names."""
        raise NotImplementedError

    def register_indices(self) -> None:
        """Makes the buffers, once in the module's life."""
        for name, index in self.indices().items():
            self.register_buffer(name, index, persistent=False)


class Selection(Indexed):
    """What a block reads of the normed hidden state, and where in the residual stream it adds its output.

    inputs, outputs: positions in the hidden state, distinct and rising; None for all of them. The norm before the block
    is over the whole hidden state.
    """

    inputs: Tensor | None
    outputs: Tensor | None

    def __init__(self, inputs: list[int] | None, outputs: list[int] | None) -> None:
        super().__init__()
        self._positions = {"inputs": inputs, "outputs": outputs}
        self.register_indices()

    def indices(self) -> dict[str, Tensor | None]:
        """As in `Indexed`."""
        return {name: None if given is None else torch.tensor(given) for name, given in self._positions.items()}

    def read(self, normed: Tensor) -> Tensor:
        """The inputs of the block, [batch, tokens, inputs], from the normed hidden state [batch, tokens, hidden]."""
        return normed if self.inputs is None else normed.index_select(-1, self.inputs)

    def add(self, layer: Any, stream: Tensor, output: Tensor) -> Tensor:
        """The residual stream [batch, tokens, hidden] with the output [batch, tokens, outputs] of a block added."""
        if self.outputs is None:
            return add_block(layer, stream, output)
        return stream.index_add(-1, self.outputs, (output * residual_multiplier(layer)).to(stream.dtype))
