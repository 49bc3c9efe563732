"""Running a decoder layer by layer, for methods that read or change a layer before the next one runs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any, cast

from torch import Tensor, nn
from transformers import PreTrainedModel

from atp.families import Block


class _Stop(Exception):
    """Ends a forward pass whose rest is not needed."""


@contextmanager
def reached(module: nn.Module) -> Iterator[list[Any]]:
    """Ends the pass inside the with block when it reaches a module; yields [its first argument, its keywords]."""
    found: list[Any] = []

    def stop(module: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Any]) -> None:
        found.extend((args[0], kwargs))
        raise _Stop

    hook = module.register_forward_pre_hook(stop, with_kwargs=True)
    try:
        with suppress(_Stop):
            yield found
    finally:
        hook.remove()


class _Recorder(nn.Module):
    """Stands in for a decoder layer: keeps the keyword arguments of its call, and returns its input."""

    arguments: dict[str, Any]

    def forward(self, x: Tensor, **arguments: Any) -> Tensor:
        self.x, self.arguments = x, arguments
        return x


LayerArguments = list[dict[str, Any]]
"""For each decoder layer, the keyword arguments of its attention; layers may differ in their masks."""


def first_layer_inputs(decoder: PreTrainedModel, batch: dict[str, Any]) -> tuple[Tensor, LayerArguments]:
    """The hidden states [batch, tokens, hidden] that reach the first layer for a batch, and all layers' arguments.

    Samples of a row that has `position_ids` do not see each other. No layer runs.
    """
    layers = cast(nn.ModuleList, decoder.layers)
    recorders = [_Recorder() for _ in layers]
    decoder.layers = nn.ModuleList(recorders)
    try:
        decoder(**hidden_arguments(batch))
    finally:
        decoder.layers = layers
    return recorders[0].x, [recorder.arguments for recorder in recorders]


def hidden_arguments(batch: dict[str, Any]) -> dict[str, Tensor | None]:
    """Arguments for a pass that needs no loss; samples that share a row do not see each other."""
    return {"input_ids": batch["input_ids"], "position_ids": batch.get("position_ids"), "use_cache": False}


def run_block(layer: Any, block: Block, x: Tensor, arguments: LayerArguments) -> Tensor:
    """x + m * after(module(before(x))), [batch, tokens, hidden]; arguments as `first_layer_inputs` gives them."""
    return add_output(layer, block, x, block_output(layer, block, x, arguments))


def block_output(layer: Any, block: Block, x: Tensor, arguments: LayerArguments) -> Tensor:
    """module(before(x)), [batch, tokens, hidden]: what the last linear of a block gives."""
    normed = x if block.before is None else layer.get_submodule(block.before)(x)
    module = layer.get_submodule(block.module)
    if block.module == "mlp":
        return mlp_output(module, normed)
    return cast(Tensor, module(hidden_states=normed, **arguments[module.layer_idx])[0])


def mlp_output(mlp: Any, normed: Tensor) -> Tensor:
    """What an MLP gives, [batch, tokens, hidden]; that of gpt-oss also says how it chose experts."""
    output: Any = mlp(normed)
    return cast(Tensor, output[0] if isinstance(output, tuple) else output)


def add_output(layer: Any, block: Block, x: Tensor, output: Tensor) -> Tensor:
    """x + m * after(output), for an output that `block_output` gave."""
    return add_block(layer, x, output if block.after is None else layer.get_submodule(block.after)(output))


def add_block(layer: Any, x: Tensor, output: Tensor) -> Tensor:
    """x + m * output: what a block gives is added to the residual stream, times `residual_multiplier`."""
    multiplier = residual_multiplier(layer)
    return x + (output if multiplier == 1 else output * multiplier)


def residual_multiplier(layer: Any) -> float:
    """What Granite multiplies the output of a block by; 1 in other families."""
    return getattr(layer, "residual_multiplier", 1.0)
