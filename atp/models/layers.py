"""Running a decoder layer by layer, for whoever looks at or changes each layer before the next one is reached."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

from torch import Tensor, nn

BLOCKS = (("input_layernorm", "self_attn"), ("post_attention_layernorm", "mlp"))
"""The norm and the module of the two residual blocks of a decoder layer: x + m * block(norm(x))."""


class _Stop(Exception):
    """Ends a forward pass whose rest is not needed."""


@contextmanager
def reached(module: nn.Module) -> Iterator[list[Any]]:
    """Ends the pass that the with block runs where it reaches a module; gives [its first argument, its keywords]."""
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


def first_layer_inputs(decoder: nn.Module, batch: dict[str, Any]) -> list[Any]:
    """What the first layer is called with for a batch: hidden states, and the arguments that every attention gets.

    Samples of a row that has `position_ids` do not see each other.
    """
    with reached(decoder.layers[0]) as found:
        decoder(**hidden_arguments(batch))
    return found


def hidden_arguments(batch: dict[str, Any]) -> dict[str, Tensor | None]:
    """Arguments for a pass whose loss nobody asks for; samples that share a row do not see each other."""
    return {"input_ids": batch["input_ids"], "position_ids": batch.get("position_ids"), "use_cache": False}


def run_block(layer: nn.Module, norm: str, block: str, x: Tensor, arguments: dict[str, Any]) -> Tensor:
    """x + m * block(norm(x)), [batch, tokens, hidden]; arguments as `first_layer_inputs` gives them."""
    normed = layer.get_submodule(norm)(x)
    if block == "mlp":
        return add_block(layer, x, layer.mlp(normed))
    return add_block(layer, x, layer.self_attn(hidden_states=normed, **arguments)[0])


def add_block(layer: nn.Module, x: Tensor, output: Tensor) -> Tensor:
    """x + m * output: what a block gives is added to the residual stream, times Granite's residual multiplier."""
    multiplier = getattr(layer, "residual_multiplier", 1.0)
    return x + (output if multiplier == 1 else output * multiplier)
