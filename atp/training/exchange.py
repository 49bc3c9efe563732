"""Averages gradients over the processes of a run, while the backward pass that makes them is still under way."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor, nn

from atp.processes import processes

_PIECE_BYTES = 25 * 2**20


class Exchange:
    """The gradients of some parameters, in pieces of about 25 MB that are sent off as soon as they are complete.

    The pieces are the same in every step and after every start. With three processes or more the bits of a sum depend
    on where in its piece an element stands; torch's DistributedDataParallel cuts other pieces from its second step on,
    so that a run that resumes with it does not end with the same bits.
    """

    def __init__(self, parameters: Iterable[nn.Parameter]) -> None:
        """parameters: in the order in which the forward pass uses them. All processes must give the same."""
        self._pieces = _pieces([p for p in parameters if p.requires_grad][::-1])
        self._incomplete: list[int] = []
        self._sent: list[tuple[list[Tensor], Tensor, dist.Work | None]] = []
        self._open = False
        if processes.count() > 1:
            for number, piece in enumerate(self._pieces):
                for parameter in piece:
                    parameter.register_post_accumulate_grad_hook(partial(self._note, number))

    @contextmanager
    def during_backward(self) -> Iterator[None]:
        """Around the last backward pass of a step, after which gradients are means over the processes.

        A parameter without a gradient must have none in any process. Does nothing with one process.
        """
        self._incomplete, self._sent = [len(piece) for piece in self._pieces], []
        self._open = True
        try:
            yield
        finally:
            self._open = False
        if processes.count() == 1:
            return
        while len(self._sent) < len(self._pieces):
            self._send()
        for gradients, means, work in self._sent:
            if work is not None:
                work.wait()
            means.div_(processes.count())
            for gradient, mean in zip(gradients, means.split([g.numel() for g in gradients]), strict=True):
                gradient.copy_(mean.view_as(gradient))
        self._sent = []

    def _note(self, number: int, parameter: Tensor) -> None:
        if not self._open:
            return
        self._incomplete[number] -= 1
        # In their order, whichever is complete first: all processes must send the same one.
        while len(self._sent) < len(self._pieces) and not self._incomplete[len(self._sent)]:
            self._send()

    def _send(self) -> None:
        gradients = [p.grad for p in self._pieces[len(self._sent)] if p.grad is not None]
        if not gradients:
            self._sent.append(([], torch.empty(0), None))
            return
        sums = torch.cat([gradient.flatten() for gradient in gradients])
        self._sent.append((gradients, sums, processes.begin_sum(sums)))


def _pieces(parameters: list[nn.Parameter]) -> list[list[nn.Parameter]]:
    pieces: list[list[nn.Parameter]] = []
    room = 0
    for parameter in parameters:
        size = parameter.numel() * parameter.itemsize
        if size > room or not pieces:
            pieces.append([])
            room = _PIECE_BYTES
        pieces[-1].append(parameter)
        room -= size
    return pieces
