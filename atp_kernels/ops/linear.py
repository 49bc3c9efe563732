"""torch.library registration and eager short cut of the masked LoRA linear."""

from collections.abc import Sequence
from types import ModuleType

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from atp_kernels.call import matrix, refuse_twice, select
from atp_kernels.ops.plain import LoraLinear
from atp_kernels.reference import dropout_of


def linear(
    tensors: tuple[Tensor | None, ...],
    scaling: float,
    mask_lora: bool,
    with_norms: bool,
    dropout: float,
    seed: int | Tensor | None,
    backend: str,
) -> Tensor | tuple[Tensor, Tensor, Tensor]:
    """Masked LoRA linear of (x, weight, lora_a, lora_b, bias, lora_input, out_mask, in_mask), checked and cast."""
    x, weight, lora_a, lora_b, bias, lora_input, out_mask, in_mask = tensors
    keep_sum = out_mask is not None and out_mask.requires_grad and torch.is_grad_enabled()
    if not torch.compiler.is_compiling():
        plain = out_mask is None and in_mask is None and not dropout
        module = select("masked_lora_linear", x.device, x.dtype, backend, plain=plain)[0]
        if plain and lora_input is None and not with_norms and module.ADDMM_CHAIN:
            return LoraLinear.apply(x, weight, lora_a, lora_b, bias, scaling)
        drawn = dropout_of(dropout, seed)
        return MaskedLoraLinear.apply(*tensors, module, scaling, mask_lora, keep_sum, with_norms, drawn)
    # A tensor, so that a graph is compiled once for all seeds; on the CPU, so that reading it waits for no device.
    seed = torch.tensor(seed) if dropout and not isinstance(seed, Tensor) else seed
    rows = matrix(x)
    adapter = None if lora_input is None else matrix(lora_input)
    y, _, _, *norms = masked_lora_linear_op(
        rows, weight, lora_a, lora_b, bias, adapter, out_mask, in_mask,
        scaling, mask_lora, keep_sum, with_norms, dropout, seed if dropout else None, backend,
    )  # fmt: skip
    y = y.view(*x.shape[:-1], weight.shape[0])
    return (y, *norms) if with_norms else y


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
    with_norms: bool,
    dropout: float,
    seed: Tensor | None,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """2-D masked LoRA linear: (y, S, un-masked sum, row squares of B, column squares of A), empty where not asked."""
    module = _select(x, out_mask, in_mask, dropout, backend)
    tensors = (x, weight, lora_a, lora_b, bias, lora_input, out_mask, in_mask)
    options = (scaling, mask_lora, keep_sum, with_norms, dropout_of(dropout, seed))
    results = module.masked_lora_linear_forward(*tensors, *options)
    return tuple(x.new_empty(0) if result is None else result for result in results)


@masked_lora_linear_op.register_fake
def _(
    x, weight, lora_a, lora_b, bias, lora_input, out_mask, in_mask,
    scaling, mask_lora, keep_sum, with_norms, dropout, seed, backend,
):  # fmt: skip
    y = x.new_empty(x.shape[0], weight.shape[0])
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    return (
        y,
        x.new_empty(x.shape[0], lora_a.shape[0]),
        torch.empty_like(y) if keep_sum else x.new_empty(0),
        x.new_empty(weight.shape[0], dtype=wide) if with_norms else x.new_empty(0),
        x.new_empty(weight.shape[1], dtype=wide) if with_norms else x.new_empty(0),
    )


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
    down: Tensor | None,
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
    module = _select(grad_y, out_mask, in_mask, dropout, backend)
    saved = (x, weight, lora_a, lora_b, lora_input, out_mask, in_mask, down, total)
    options = (scaling, mask_lora, shared_input, needs, dropout_of(dropout, seed))
    grads = module.masked_lora_linear_backward(grad_y, *saved, *options)
    return [grad for grad in grads if grad is not None]


@masked_lora_linear_backward_op.register_fake
def _(
    grad_y, x, weight, lora_a, lora_b, lora_input, out_mask, in_mask, down, total,
    scaling, mask_lora, shared_input, needs, dropout, seed, backend,
):  # fmt: skip
    (n_out, n_in), rows = weight.shape, grad_y.shape[0]
    shapes = ((rows, n_in), (n_out, n_in), lora_a.shape, lora_b.shape, (n_out,), (rows, n_in), (n_out,), (n_in,))
    wide = torch.float64 if grad_y.dtype == torch.float64 else torch.float32
    dtypes = (grad_y.dtype,) * 6 + (wide,) * 2
    return [
        grad_y.new_empty(shape, dtype=dtype) for shape, dtype, need in zip(shapes, dtypes, needs, strict=True) if need
    ]


def _linear_setup(ctx, inputs, output) -> None:
    *tensors, ctx.scaling, ctx.mask_lora, _, _, ctx.dropout, seed, ctx.backend = inputs
    _save_linear(ctx, tensors, output[1], output[2], seed)


def _linear_backward(ctx, grad_y, grad_down, grad_total, grad_rows, grad_cols):
    *saved, seed = ctx.saved_tensors
    options = (ctx.scaling, ctx.mask_lora, ctx.shared_input, list(ctx.needs), ctx.dropout, seed, ctx.backend)
    wanted = iter(masked_lora_linear_backward_op(grad_y, *saved, *options))
    grads = [next(wanted) if need else None for need in ctx.needs]
    if grad_rows.numel():
        _add_norm_gradients(grads, saved, grad_rows, grad_cols)
    return (*grads, *[None] * 7)


masked_lora_linear_op.register_autograd(_linear_backward, setup_context=_linear_setup)
masked_lora_linear_backward_op.register_autograd(refuse_twice)


def _select(
    tensor: Tensor, out_mask: Tensor | None, in_mask: Tensor | None, dropout: float, backend: str
) -> ModuleType:
    plain = out_mask is None and in_mask is None and not dropout
    return select("masked_lora_linear", tensor.device, tensor.dtype, backend, plain=plain)[0]


def _save_linear(
    ctx, tensors: Sequence[Tensor | None], down: Tensor, total: Tensor | None, *others: Tensor | None
) -> None:
    """Keep what the wanted gradients read, and nothing else: x and S, and the un-masked sum for a soft output mask."""
    x, weight, lora_a, lora_b, _, lora_input, out_mask, in_mask = tensors
    ctx.shared_input = lora_input is None
    ctx.needs = _, need_w, need_a, need_b, _, _, need_out, need_in = ctx.needs_input_grad[:8]
    read_adapter = need_a or (need_in and ctx.mask_lora)
    ctx.save_for_backward(
        x if need_w or need_in or (ctx.shared_input and read_adapter) else None,
        weight,
        lora_a,
        lora_b,
        lora_input if read_adapter else None,
        out_mask,
        in_mask,
        down if need_b else None,
        total if need_out else None,
        *others,
    )


def _add_norm_gradients(
    grads: list[Tensor | None], saved: Sequence[Tensor], grad_rows: Tensor | None, grad_cols: Tensor | None
) -> None:
    """Add d(row squares)/dB = 2 B and d(column squares)/dA = 2 A, in plain ATen: the factors are small."""
    lora_a, lora_b = saved[2:4]
    if grads[2] is not None and grad_cols is not None:
        grads[2] = grads[2] + (2 * grad_cols * lora_a).to(lora_a.dtype)
    if grads[3] is not None and grad_rows is not None:
        grads[3] = grads[3] + (2 * grad_rows.unsqueeze(1) * lora_b).to(lora_b.dtype)


class MaskedLoraLinear(torch.autograd.Function):
    """Eager masked LoRA linear: y, or (y, row squares of B, column squares of A) with `with_norms`."""

    @staticmethod
    def forward(
        ctx, x, weight, lora_a, lora_b, bias, lora_input, out_mask, in_mask,
        module, scaling, mask_lora, keep_sum, with_norms, dropout,
    ):  # fmt: skip
        ctx.module, ctx.scaling, ctx.mask_lora, ctx.dropout, ctx.shape = module, scaling, mask_lora, dropout, x.shape
        rows = matrix(x)
        adapter = None if lora_input is None else matrix(lora_input)
        tensors = (rows, weight, lora_a, lora_b, bias, adapter, out_mask, in_mask)
        y, down, total, *norms = module.masked_lora_linear_forward(
            *tensors, scaling, mask_lora, keep_sum, with_norms, dropout
        )
        _save_linear(ctx, tensors, down, total)
        y = y if rows is x else y.view(*x.shape[:-1], weight.shape[0])
        if not with_norms:
            return y
        ctx.set_materialize_grads(False)
        return y, *norms

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_y, grad_rows=None, grad_cols=None):
        saved, shape = ctx.saved_tensors, ctx.shape
        if grad_y is None:
            weight = saved[1]
            grad_y = weight.new_zeros(*shape[:-1], weight.shape[0])
        options = (ctx.scaling, ctx.mask_lora, ctx.shared_input, ctx.needs, ctx.dropout)
        grads = ctx.module.masked_lora_linear_backward(matrix(grad_y), *saved, *options)
        if grad_rows is not None or grad_cols is not None:
            grads = list(grads)
            _add_norm_gradients(grads, saved, grad_rows, grad_cols)
        if len(shape) != 2:
            grads = [grad if grad is None or i not in (0, 5) else grad.view(shape) for i, grad in enumerate(grads)]
        return (*grads, *[None] * 6)
