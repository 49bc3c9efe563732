"""Running a decoder layer by layer, for whoever looks at or changes each layer before the next one is reached."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

from torch import Tensor, nn

BLOCKS = (("input_layernorm", "self_attn"), ("post_attention_layernorm", "mlp"))
"""The two residual blocks of a Llama layer: x + block(norm(x))."""


class _Stop(Exception):
    """Ends a forward pass whose rest is not needed."""


def first_layer_inputs(decoder: nn.Module, batch: dict[str, Any]) -> tuple[Tensor, dict[str, Any]]:
    """What the first layer is called with for a batch: hidden states, and the arguments that every attention gets.

    Samples of a row that has `position_ids` do not see each other.
    """
    captured = []

    def stop(module: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Any]) -> None:
        captured.append((args[0], kwargs))
        raise _Stop

    hook = decoder.layers[0].register_forward_pre_hook(stop, with_kwargs=True)
    try:
        with suppress(_Stop):
            decoder(**hidden_arguments(batch))
    finally:
        hook.remove()
    return captured[0]


def hidden_arguments(batch: dict[str, Any]) -> dict[str, Tensor | None]:
    """Arguments for a pass whose loss nobody asks for; samples that share a row do not see each other."""
    return {"input_ids": batch["input_ids"], "position_ids": batch.get("position_ids"), "use_cache": False}


def run_block(layer: nn.Module, norm: str, block: str, x: Tensor, arguments: dict[str, Any]) -> Tensor:
    """x + block(norm(x)), [batch, tokens, hidden]; arguments as `first_layer_inputs` gives them."""
    normed = layer.get_submodule(norm)(x)
    if block == "mlp":
        return x + layer.mlp(normed)
    return x + layer.self_attn(hidden_states=normed, **arguments)[0]
