"""The LoRA linear on a kept slice in Triton: the vendor's products and gathers of ATen, or one kernel of descriptors.

That kernel is `linear.descriptor_kernels`. It runs where a tile for it is named (`linear.tiles`) and each side is whole
or lies kept first. Tiles of removed outputs then read no weight and add the adapter alone, and with a tile of
`one_pass` base product and adapter are one launch.
"""

# `readable` gives None for None alone, which a type checker cannot see.
# mypy: disable-error-code="arg-type"

from functools import partial

import torch
from torch import Tensor

from atp_kernels import triton_runtime
from atp_kernels.call import Call
from atp_kernels.kept import aten
from atp_kernels.kept.operands import Gradients, Needs, Operands, Saved
from atp_kernels.kept.sides import Side
from atp_kernels.linear import descriptors, tiles
from atp_kernels.linear import triton as linear


def supports(call: Call) -> str | None:
    """float32, float16 and bfloat16, on CUDA or in the interpreter."""
    return triton_runtime.refuses(call)


def forward(operands: Operands, *, config: tiles.DescriptorConfig | None = None) -> tuple[Tensor, Tensor]:
    """As `aten.forward`; a `config` names the tile, in place of the environment."""
    x, weight, bias, lora_a, lora_b, lora_input, outs, ins, scaling = operands
    config = config or tiles.named_tile(x.dtype)
    if config is not None and config.one_pass and _in_order(outs, ins):
        m, n, rank = x.shape[0], lora_b.shape[0], lora_a.shape[0]
        low, high = aten.ordered(lora_a, ins, 1), linear.readable(aten.ordered(lora_b, outs, 0))
        if not _refuses(config, x, weight, rank, n, low, lora_input):
            y, s = x.new_empty(m, n), x.new_empty(m, rank)
            with torch.cuda.device_of(x):
                descriptors.launch(
                    x, weight, low, high, s, y, config, linear.numerics(x),
                    scaling=scaling, lora_input=lora_input, bias=linear.readable(bias),
                )  # fmt: skip
            return y, s
    return aten.forward(operands, primitives=aten.Primitives(product=partial(_product, config=config)))


def backward(grad_y: Tensor, saved: Saved, needs: Needs, *, config: tiles.DescriptorConfig | None = None) -> Gradients:
    """As `aten.backward`; a `config` as in `forward`."""
    config = config or tiles.named_tile(grad_y.dtype)
    return aten.backward(grad_y, saved, needs, primitives=aten.Primitives(product=partial(_product, config=config)))


def _product(values, matrix, bias, source, target, low, high, *rest, config):
    """As `aten.product`, by descriptors where they take it."""
    rank, n = high.shape
    weight = matrix.t()
    if config is None or not _in_order(source, target) or _refuses(config, values, weight, rank, n):
        return aten.product(values, matrix, bias, source, target, low, high, *rest)
    result = values.new_empty(values.shape[0], n)
    with torch.cuda.device_of(values):
        descriptors.launch(
            values, weight, None, linear.readable(high.t()), low, result, config, linear.numerics(values),
            bias=linear.readable(bias),
        )  # fmt: skip
    return result


def _in_order(*sides: Side | None) -> bool:
    return all(side is None or side.kept_first for side in sides)


def _refuses(
    config: tiles.DescriptorConfig,
    values: Tensor,
    weight: Tensor,
    rank: int,
    n: int,
    lora_a: Tensor | None = None,
    lora_input: Tensor | None = None,
) -> str | None:
    if not 0 < rank <= tiles.LARGEST_RANK or max(values.shape[1], n) >= linear.LARGEST_STRIDE:
        return "the adapter is too wide"
    return descriptors.refuses(config, values, weight, n, lora_a, lora_input)
