"""torch.library registration and eager Function of the adapter's dropout."""

from typing import NamedTuple

import torch
from torch import Tensor

from atp_kernels.call import Operation, Order, matrix, register, select, unflattened
from atp_kernels.dropout.definition import Dropout

OPERATION = register(
    Operation(
        name="lora_dropout",
        package=__package__,
        backends=("reference", "triton", "native"),
        # ATen makes each random word in about forty passes over int64, the kernels in registers.
        order={"cpu": Order(("native", "reference")), "cuda": Order(("triton", "reference"))},
    )
)


class Drop(NamedTuple):
    """Makes what an adapter reads of a matrix, and its gradient on the way back: the same elements in each call."""

    dropout: Dropout
    backend: str

    @property
    def seed(self) -> int | Tensor:
        """As in `Dropout`."""
        return self.dropout.seed

    def __call__(self, values: Tensor) -> Tensor:
        return _dropped(values, self.dropout, self.backend)


def drop_of(p: float, seed: int | Tensor | None, backend: str) -> Drop | None:
    """`dropout_of` with the backend that is to draw; None where nothing is dropped."""
    dropout = dropout_of(p, seed)
    return None if dropout is None else Drop(dropout, backend)


def dropped(x: Tensor, p: float, seed: int | Tensor, backend: str) -> Tensor:
    """x [..., K] after dropout, checked."""
    if not torch.compiler.is_compiling():
        return LoraDropout.apply(x, dropout_of(p, seed), backend)
    seed = seed if isinstance(seed, Tensor) else torch.tensor(seed)
    return lora_dropout_op(matrix(x), p, seed, backend).view(x.shape)


def dropout_of(p: float, seed: int | Tensor | None) -> Dropout | None:
    """Probability and seed as backends take them, None where nothing is dropped."""
    return None if not p or seed is None else Dropout(p, unread(seed))


def unread(seed: int | Tensor) -> int | Tensor:
    """The seed as backends take it: nothing reads one on a GPU, which would wait for all that the GPU has to do."""
    return seed if isinstance(seed, Tensor) and seed.device.type != "cpu" else int(seed)


def held(dropout: Dropout | Drop | None) -> Tensor | None:
    """A seed on the device, which autograd holds until backward draws again, to raise if it was written to."""
    return dropout.seed if dropout is not None and isinstance(dropout.seed, Tensor) else None


@torch.library.custom_op("atp_kernels::lora_dropout", mutates_args=())
def lora_dropout_op(x: Tensor, p: float, seed: Tensor, backend: str) -> Tensor:
    """Dropout of a matrix by position and seed. Its gradient is the same dropout of the gradient."""
    return _dropped(x, Dropout(p, unread(seed)), backend)


@lora_dropout_op.register_fake
def _(x, p, seed, backend):
    return x.new_empty(x.shape)


def _setup(ctx, inputs, output) -> None:
    _, ctx.p, seed, ctx.backend = inputs
    ctx.save_for_backward(seed)


def _backward(ctx, grad):
    return lora_dropout_op(grad, ctx.p, *ctx.saved_tensors, ctx.backend), None, None, None


lora_dropout_op.register_autograd(_backward, setup_context=_setup)


class LoraDropout(torch.autograd.Function):
    """Eager dropout by seed: saves nothing but probability and seed."""

    @staticmethod
    def forward(ctx, x, dropout, backend):
        ctx.dropout, ctx.backend = dropout, backend
        ctx.save_for_backward(held(dropout))
        return unflattened(_dropped(matrix(x), dropout, backend), x.shape)

    @staticmethod
    def backward(ctx, grad):
        (seed,) = ctx.saved_tensors
        dropout = ctx.dropout if seed is None else ctx.dropout._replace(seed=seed)
        return LoraDropout.apply(grad, dropout, ctx.backend), None, None


def _dropped(x: Tensor, dropout: Dropout, backend: str) -> Tensor:
    return select("lora_dropout", x.device, x.dtype, backend).module.dropped(x, dropout)
