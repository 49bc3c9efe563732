"""torch.library registration and eager Functions of the masked LoRA linear."""

from collections.abc import Sequence

import torch
from torch import Tensor

from atp_kernels.call import (
    Choice,
    Operation,
    Order,
    differentiable_once,
    matrix,
    refuse_twice,
    register,
    select,
    unflattened,
)
from atp_kernels.dropout.op import dropout_of, held
from atp_kernels.kept.op import kept_linear
from atp_kernels.kept.slices import CallSlice
from atp_kernels.linear import ways
from atp_kernels.linear.aten import scaled_mm, sum_of_products
from atp_kernels.linear.folded import folded_linear
from atp_kernels.linear.operands import Needs, Operands, Options, Saved
from atp_kernels.quantized import dense
from atp_kernels.tuning.table import FOLDED, SLICED

BACKENDS = ("reference", "triton", "native")
ORDER = {
    # Both call the same vendor GEMM; around it, native masks and sums took 0.13 to 1.0 of the time, without a mask
    # there is nothing to do for either (768 x 576 to 768 x 1536, two threads).
    "cpu": Order(("native", "reference")),
    "cuda": Order(("triton", "reference")),
    # A Triton GEMM reaches about 0.87 of the vendor's on H100, which costs more than an addmm_ of the adapter.
    "cuda plain": Order(("reference",), "no mask and no dropout, so nothing to fuse beats the addmm_ chain"),
}
register(Operation("masked_lora_linear", __package__, BACKENDS, ORDER, ways.explained))


def linear(
    operands: Operands,
    scaling: float,
    mask_lora: bool,
    dropout: float,
    seed: int | Tensor | None,
    backend: str,
    rank: int,
) -> Tensor:
    """Masked LoRA linear of operands that are checked and cast.

    rank: that of the adapter before it may have become a part of the weight, by which tuned tables know it.
    """
    x, weight, lora_a, lora_b, bias, lora_input, out_mask, in_mask = operands
    if not torch.compiler.is_compiling():
        way = None if backend != "auto" or dropout else ways.way_of(operands, rank, mask_lora)
        if way is not None:
            return linear_by(way, operands, scaling, mask_lora)
        plain = out_mask is None and in_mask is None and not dropout
        module = select("masked_lora_linear", x.device, x.dtype, backend, plain=plain).module
        if plain and lora_input is None and module.ADDMM_CHAIN:
            return LoraLinear.apply(x, weight, lora_a, lora_b, bias, scaling)
        options = Options(scaling, mask_lora, keeps_sum(out_mask), dropout_of(dropout, seed))
        return MaskedLoraLinear.apply(*operands, module, options)
    # A tensor, so that a graph is compiled once for all seeds; on the CPU, where an int comes from.
    seed = torch.tensor(seed) if dropout and not isinstance(seed, Tensor) else seed
    y, _, _ = masked_lora_linear_op(
        *operands._replace(x=matrix(x), lora_input=None if lora_input is None else matrix(lora_input)),
        scaling, mask_lora, keeps_sum(out_mask), dropout, seed if dropout else None, backend,
    )  # fmt: skip
    return y.view(*x.shape[:-1], weight.shape[0])


def linear_by(way: ways.Way, operands: Operands, scaling: float, mask_lora: bool) -> Tensor:
    """Eager masked LoRA linear in this way, without dropout."""
    x, weight, lora_a, lora_b, bias, lora_input, out_mask, in_mask = operands
    if way.name == SLICED:
        base = weight.detach(), None if bias is None else bias.detach()
        kept = CallSlice(*base, out_mask=out_mask, in_mask=in_mask)
        y = kept_linear(x, kept, lora_a, lora_b, lora_input, scaling, "auto")
        kept.release()
        return y
    if way.name == FOLDED:
        return folded_linear(operands, scaling, mask_lora)
    if out_mask is None and in_mask is None and lora_input is None and way.module.ADDMM_CHAIN:
        return LoraLinear.apply(x, weight, lora_a, lora_b, bias, scaling)
    options = Options(scaling, mask_lora, keeps_sum(out_mask))
    return MaskedLoraLinear.apply(*operands, way.module, options)


def keeps_sum(out_mask: Tensor | None) -> bool:
    """Whether backward will read the sum before the output mask: its gradient does."""
    return out_mask is not None and out_mask.requires_grad and torch.is_grad_enabled()


def _choice(x: Tensor, out_mask: Tensor | None, in_mask: Tensor | None, dropout: float, backend: str) -> Choice:
    plain = out_mask is None and in_mask is None and not dropout
    return select("masked_lora_linear", x.device, x.dtype, backend, plain=plain)


@torch.library.custom_op("atp_kernels::masked_lora_linear", mutates_args=())
def masked_lora_linear_op(
    x: Tensor,
    weight: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    bias: Tensor | None,
    lora_input: Tensor | None,
    out_mask: Tensor | None,
    in_mask: Tensor | None,
    scaling: float,
    mask_lora: bool,
    keep_sum: bool,
    dropout: float,
    seed: Tensor | None,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """2-D masked LoRA linear: the fields of `Results`, empty where not asked for."""
    module = _choice(x, out_mask, in_mask, dropout, backend).module
    operands = Operands(x, weight, lora_a, lora_b, bias, lora_input, out_mask, in_mask)
    y, s, total = module.forward(operands, Options(scaling, mask_lora, keep_sum, dropout_of(dropout, seed)))
    return y, s, x.new_empty(0) if total is None else total


@masked_lora_linear_op.register_fake
def _(
    x, weight, lora_a, lora_b, bias, lora_input, out_mask, in_mask,
    scaling, mask_lora, keep_sum, dropout, seed, backend,
):  # fmt: skip
    y = x.new_empty(x.shape[0], weight.shape[0])
    return y, x.new_empty(x.shape[0], lora_a.shape[0]), torch.empty_like(y) if keep_sum else x.new_empty(0)


@torch.library.custom_op("atp_kernels::masked_lora_linear_backward", mutates_args=())
def masked_lora_linear_backward_op(
    grad_y: Tensor,
    x: Tensor | None,
    weight: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    lora_input: Tensor | None,
    out_mask: Tensor | None,
    in_mask: Tensor | None,
    s: Tensor | None,
    total: Tensor | None,
    scaling: float,
    mask_lora: bool,
    shared_input: bool,
    needs: Sequence[bool],
    dropout: float,
    seed: Tensor | None,
    backend: str,
) -> list[Tensor]:
    """The wanted gradients, in the order of the forward's tensors."""
    module = _choice(grad_y, out_mask, in_mask, dropout, backend).module
    saved = Saved(x, weight, lora_a, lora_b, lora_input, out_mask, in_mask, s, total)
    options = Options(scaling, mask_lora, dropout=dropout_of(dropout, seed))
    grads = module.backward(grad_y, saved, options, Needs._make((*needs, shared_input)))
    return [grad for grad in grads if grad is not None]


@masked_lora_linear_backward_op.register_fake
def _(
    grad_y, x, weight, lora_a, lora_b, lora_input, out_mask, in_mask, s, total,
    scaling, mask_lora, shared_input, needs, dropout, seed, backend,
):  # fmt: skip
    (n_out, n_in), rows = weight.shape, grad_y.shape[0]
    shapes = ((rows, n_in), (n_out, n_in), lora_a.shape, lora_b.shape, (n_out,), (rows, n_in), (n_out,), (n_in,))
    wide = torch.float64 if grad_y.dtype == torch.float64 else torch.float32
    dtypes = (grad_y.dtype,) * 6 + (wide,) * 2
    return [
        grad_y.new_empty(shape, dtype=dtype) for shape, dtype, need in zip(shapes, dtypes, needs, strict=True) if need
    ]


def _setup(ctx, inputs, output) -> None:
    *tensors, scaling, mask_lora, _, ctx.dropout, seed, ctx.backend = inputs
    ctx.options = Options(scaling, mask_lora)
    _save(ctx, Operands(*tensors), output[1], output[2], seed)


def _backward(ctx, grad_y, grad_s, grad_total):
    *saved, seed = ctx.saved_tensors
    *needs, shared_input = ctx.needs
    options = (*ctx.options[:2], shared_input, needs, ctx.dropout, seed, ctx.backend)
    wanted = iter(masked_lora_linear_backward_op(grad_y, *saved, *options))
    return (*(next(wanted) if need else None for need in needs), *[None] * 6)


masked_lora_linear_op.register_autograd(_backward, setup_context=_setup)
masked_lora_linear_backward_op.register_autograd(refuse_twice)


def _save(ctx, operands: Operands, s: Tensor, total: Tensor | None, *others: Tensor | None) -> None:
    """Keep what the wanted gradients read, and nothing else: x and S, and the sum for a soft output mask."""
    x, weight, lora_a, lora_b, _, lora_input, out_mask, in_mask = operands
    shared_input = lora_input is None
    ctx.needs = needs = Needs._make((*ctx.needs_input_grad[:8], shared_input))
    read_adapter = needs.lora_a or (needs.in_mask and ctx.options.mask_lora)
    read_x = needs.weight or needs.in_mask or (shared_input and read_adapter)
    ctx.save_for_backward(
        x if read_x else None,
        weight,
        lora_a,
        lora_b,
        lora_input if read_adapter else None,
        out_mask,
        in_mask,
        s if needs.lora_b else None,
        total if needs.out_mask else None,
        *others,
    )


class MaskedLoraLinear(torch.autograd.Function):
    """Eager masked LoRA linear."""

    @staticmethod
    def forward(ctx, x, weight, lora_a, lora_b, bias, lora_input, out_mask, in_mask, module, options):
        ctx.module, ctx.options, ctx.shape = module, options, x.shape
        rows = matrix(x)
        adapter = None if lora_input is None else matrix(lora_input)
        operands = Operands(rows, weight, lora_a, lora_b, bias, adapter, out_mask, in_mask)
        y, s, total = module.forward(operands._replace(weight=dense(weight)), options)
        _save(ctx, operands, s, total, held(options.dropout))
        return unflattened(y, x.shape)

    @staticmethod
    @differentiable_once
    def backward(ctx, grad_y):
        saved, shape = Saved._make(ctx.saved_tensors[:-1]), ctx.shape
        saved = saved._replace(weight=dense(saved.weight))
        grads = ctx.module.backward(matrix(grad_y), saved, ctx.options, ctx.needs)
        if len(shape) != 2:
            grads = [grad if grad is None or i not in (0, 5) else grad.view(shape) for i, grad in enumerate(grads)]
        return (*grads, None, None)


class LoraLinear(torch.autograd.Function):
    """y = x W^T + bias + S B^T with S = scaling * x A^T, to the last bit what `aten.forward` makes of it.

    Every branch and call of Python that the masked linear has and this one does without is time in which no product
    runs: hundreds of small ones in a step cannot hide it. With G = dL/dy and P = scaling * G B:
    dx = G W + P A, dW = G^T x, dA = P^T x, dB = G^T S, d bias = column sums of G.
    """

    @staticmethod
    def forward(ctx, x, weight, lora_a, lora_b, bias, scaling):
        _, need_w, need_a, need_b, _, _ = ctx.needs_input_grad
        rows = matrix(x)
        s = scaled_mm(rows, lora_a.t(), scaling)
        y = sum_of_products(rows, dense(weight).t(), s, lora_b.t(), bias)
        ctx.scaling, ctx.shape = scaling, x.shape
        ctx.save_for_backward(rows if need_w or need_a else None, weight, lora_a, lora_b, s if need_b else None)
        return unflattened(y, x.shape)

    @staticmethod
    @differentiable_once
    def backward(ctx, grad_y):
        x, weight, lora_a, lora_b, s = ctx.saved_tensors
        need_x, need_w, need_a, need_b, need_bias, _ = ctx.needs_input_grad
        grad_y = matrix(grad_y)
        up = scaled_mm(grad_y, lora_b, ctx.scaling) if need_x or need_a else None
        # Before the other gradients: the scratch memory of its products is the largest, and then meets none of them.
        d_x = sum_of_products(grad_y, dense(weight), up, lora_a) if need_x else None
        d_bias = grad_y.sum(0) if need_bias else None
        d_weight = torch.mm(grad_y.t(), x) if need_w else None
        d_b = torch.mm(grad_y.t(), s) if need_b else None
        d_a = torch.mm(up.t(), x) if need_a else None
        d_x = d_x if d_x is None or len(ctx.shape) == 2 else d_x.view(ctx.shape)
        return d_x, d_weight, d_a, d_b, d_bias, None
