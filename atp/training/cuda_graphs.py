"""The forward and backward pass of the decoder as CUDA graphs, which the host launches with one call each.

A short step costs the host more time than the GPU: thousands of launches, whatever their size. A graph holds them as
they were captured, on memory that stays where it is. Head, loss, clipping and optimizer stay outside.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from atp.ground.errors import NotReached, is_out_of_memory, reason
from atp.lora.stock import hooked
from atp.processes import processes
from atp.training.loss import causal_of
from atp_kernels.call import differentiable_once

if TYPE_CHECKING:
    from atp.training.loop import Loop

Passes = Callable[[], None]
Arguments = dict[str, Any]
"""Keywords of a decoder: tensors, dictionaries of them, and what is no tensor."""

WARM_UP = 3
"""Passes of one shape before its capture: kernels are compiled and tuned in them, and casts of weights are made."""
MOST = 16
"""Shapes with graphs of their own, which each take some megabytes; batches of any other shape run as they are."""

DEVICES = ("cuda",)
"""The types of device that capture."""

_READ_LENGTH = ("dynamic", "longrope")  # RoPE whose angles depend on how long a text is, which the host must know


class CudaGraphs:
    """Captures passes on the current device, one CUDA graph each; all of them share memory."""

    def __init__(self) -> None:
        self._pool = torch.cuda.graph_pool_handle()

    def __call__(self, passes: Passes) -> Passes:
        """Captures passes, which do not run; returns what runs them on the same memory."""
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool):
            passes()
        return graph.replay


class GraphedDecoder:
    """Calls a decoder in training; replays its passes where a batch has a shape that came before.

    parameters: what is trained, whose gradients exist and stay where they are. capture: as `CudaGraphs`.
    """

    def __init__(self, parameters: Sequence[nn.Parameter], capture: Callable[[Passes], Passes]) -> None:
        self._parameters, self._capture = parameters, capture
        self._seen: Counter[Any] = Counter()
        self._graphs: dict[Any, _Graph] = {}
        self.kept = False  # whether a forward pass that was replayed waits for its backward pass

    def __call__(self, decoder: Any, arguments: Arguments) -> Tensor:
        """The last hidden state [batch, tokens, hidden]. Raises `NotReached` for passes that cannot be captured."""
        key = tuple((name, tuple(part.shape)) for name, part in _tensors(arguments))
        graph = self._graphs.get(key)
        self._seen[key] += 1
        early = graph is None and (self._seen[key] <= WARM_UP or len(self._graphs) == MOST)
        # Of two batches before a backward pass, the second would write over what the first one keeps: graphs share it.
        if early or self.kept or not torch.is_grad_enabled():
            hidden: Tensor = decoder(**arguments).last_hidden_state
            return hidden
        if graph is None:
            try:
                graph = _Graph(decoder, arguments, self._parameters, self._capture)
            except RuntimeError as error:
                if is_out_of_memory(error):
                    raise
                raise NotReached(
                    f"a step could not be captured as a CUDA graph ({reason(error)}): set training.cuda_graphs=false"
                ) from error
            self._graphs[key] = graph
        graph.take(arguments)
        replayed: Tensor = _Replay.apply(graph.anchor, graph, self)
        return replayed


class _Graph:
    """The passes of a decoder for batches of one shape."""

    def __init__(
        self,
        decoder: Any,
        arguments: Arguments,
        parameters: Sequence[nn.Parameter],
        capture: Callable[[Passes], Passes],
    ) -> None:
        own = {name: _copied(value) for name, value in arguments.items()}
        self._inputs = _tensors(own)
        device = parameters[0].device
        self.anchor = torch.zeros((), device=device, requires_grad=True)  # so that autograd asks for a backward pass
        hidden: list[Tensor] = []
        cached = torch.is_autocast_cache_enabled()
        torch.clear_autocast_cache()
        torch.set_autocast_cache_enabled(False)  # the cache outlives the capture, its memory does not
        try:
            self.forward = capture(lambda: hidden.append(decoder(**own).last_hidden_state))
            self.output = hidden[0]
            self.slope = torch.zeros_like(self.output)
            self.backward = capture(lambda: self._accumulate(parameters))
        finally:
            torch.set_autocast_cache_enabled(cached)

    def _accumulate(self, parameters: Sequence[nn.Parameter]) -> None:
        # Not by `backward`: it would add on the stream that the parameters' first pass ran on.
        found = torch.autograd.grad(self.output, parameters, self.slope, allow_unused=True)
        for parameter, gradient in zip(parameters, found, strict=True):
            if gradient is not None:
                assert parameter.grad is not None
                parameter.grad.add_(gradient)

    def take(self, arguments: Arguments) -> None:
        """Copies a batch to where the graphs read it."""
        for (_, own), (_, given) in zip(self._inputs, _tensors(arguments), strict=True):
            own.copy_(given)


class _Replay(torch.autograd.Function):
    """Replays the passes; gradients of parameters are added where they lie, and the anchor has none."""

    @staticmethod
    def forward(ctx: Any, anchor: Tensor, graph: _Graph, owner: GraphedDecoder) -> Tensor:
        graph.forward()
        ctx.graph, ctx.owner, owner.kept = graph, owner, True
        return graph.output.detach()

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, grad: Tensor) -> tuple[None, None, None]:
        ctx.graph.slope.copy_(grad)
        ctx.graph.backward()
        ctx.owner.kept = False
        return None, None, None


def _tensors(arguments: Arguments) -> list[tuple[str, Tensor]]:
    """The tensors among arguments, also those inside dictionaries, by name."""
    found: list[tuple[str, Tensor]] = []
    for name, value in arguments.items():
        parts = value.items() if isinstance(value, dict) else [("", value)]
        found += [(f"{name}.{key}", part) for key, part in parts if isinstance(part, Tensor)]
    return found


def _copied(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _copied(part) for key, part in value.items()}
    return value.clone() if isinstance(value, Tensor) else value


def refused(loop: Loop) -> str | None:
    """Why the steps of a run cannot be captured, as the end of a sentence; None where they can."""
    training, model = loop.config.training, loop.model
    config: Any = causal_of(model).config
    if loop.device.type not in DEVICES:
        return f"it trains on {loop.device.type}, not on a GPU"
    if processes.count() > 1:
        return "its processes exchange gradients inside the backward pass"
    if loop.trains_all or training.embeddings:
        return "the head's gradient is not added inside the passes, as that of the embeddings is"
    for key in ("gradient_checkpointing", "offload"):
        if getattr(training, key):
            return f"training.{key} works inside the passes"
    if loop.config.lora.dropout:
        return "every replay would repeat what lora.dropout drew"
    if loop.config.lora.experts or loop.config.decisions.space == "expert_channels":
        return "the host counts the tokens of each expert"
    if config.rope_parameters.get("rope_type") in _READ_LENGTH:
        return f"RoPE of type {config.rope_parameters['rope_type']} reads the length of every batch"
    watched = (name for name, module in model.named_modules() if hooked(module))
    if (name := next(watched, None)) is not None:
        return f"somebody waits for calls of {name}"
    return None
