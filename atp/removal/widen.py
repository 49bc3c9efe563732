"""Float32 arithmetic for a model of narrower weights without a second copy: one part at a time is widened."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


@contextmanager
def widened(model: nn.Module) -> Iterator[None]:
    """Inside a with block, a causal LM with bfloat16 or float16 weights computes in float32 on the same weights.

    model: plain or inside PEFT, with a decoder of embeddings and what runs behind them. A layer's weights are float32
    while it runs and bit for bit the old ones afterwards; hidden states are float32 from the embeddings on. Does
    nothing for float32 and float64 weights. Kept slices are not widened: use masks without slices.
    """
    whole: Any = model
    causal = whole.get_base_model() if hasattr(model, "get_base_model") else whole
    if not any(_is_narrow(parameter) for parameter in causal.parameters()):
        yield
        return
    narrow: list[tuple[nn.Parameter, Tensor]] = []

    def widen(module: nn.Module, args: Any) -> None:
        for parameter in module.parameters():
            if _is_narrow(parameter):
                narrow.append((parameter, parameter.data))
                parameter.data = parameter.data.float()

    def restore(*_: Any) -> None:
        while narrow:
            parameter, data = narrow.pop()
            parameter.data = data

    hooks = [causal.get_input_embeddings().register_forward_hook(lambda module, args, output: output.float())]
    for part in _parts(causal):
        hooks += [part.register_forward_pre_hook(widen), part.register_forward_hook(restore, always_call=True)]
    try:
        yield
    finally:
        restore()
        for hook in hooks:
            hook.remove()


def _parts(causal: Any) -> Iterator[nn.Module]:
    """What runs one after the other behind the embeddings: the layers, the other modules of the decoder, the head."""
    embeddings = causal.get_input_embeddings()
    for child in causal.get_decoder().children():
        if isinstance(child, nn.ModuleList):
            yield from child
        elif child is not embeddings:
            yield child
    yield causal.get_output_embeddings()


def _is_narrow(parameter: Tensor) -> bool:
    return parameter.is_floating_point() and parameter.dtype.itemsize < torch.float32.itemsize


@contextmanager
def ieee_products() -> Iterator[None]:
    """Computes float32 products in float32 in a with block, or in a function that this decorates.

    Scripts may allow TF32 or bfloat16 for them (`torch.set_float32_matmul_precision`); by their rounding a correct cut
    would then look like a wrong one.
    """
    on_cpus: Any = torch.backends.mkldnn  # whose types lack `matmul`
    backends = (torch.backends.cuda.matmul, on_cpus.matmul)
    before = [backend.fp32_precision for backend in backends]
    for backend in backends:
        backend.fp32_precision = "ieee"
    try:
        yield
    finally:
        for backend, precision in zip(backends, before, strict=True):
            backend.fp32_precision = precision
