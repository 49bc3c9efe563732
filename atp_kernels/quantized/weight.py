"""`QuantizedWeight`: a frozen matrix in 4 or 8 bits that looks like the floating one that it stands for.

As a tensor subclass it lives in modules, state dicts and checks of shapes as any weight does, and it is what autograd
saves: the operations of this package dequantise it in a forward pass and again in the backward pass, so that no
floating copy outlives a product.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from atp_kernels.call import matrix, select
from atp_kernels.kinds import typed

BLOCK = 64
"""NF4 weights of one row that share a scale."""

_DIRECT = (torch.float32, torch.bfloat16, torch.float16)  # what bitsandbytes dequantises to
_LARGEST = {torch.float8_e4m3fn: 448.0, torch.int8: 127.0}


class QuantizedWeight(Tensor):
    """A frozen weight [out, in] in NF4, float8_e4m3fn or int8, made by `nf4`, `fp8`, `int8` or `from_bitsandbytes`.

    Its shape, dtype and device are those of the weight that it stands for; `dequantize()` gives that weight, in this
    dtype. `masked_lora_linear`, `kept_lora_linear` and the blocks made of them take it as weight and dequantise it in
    each call, in the backward pass once more, so that one floating matrix exists at a time and autograd keeps none.
    `torch.nn.functional.linear` does the same. `detach`, `clone` and `to` keep it quantised (a cast changes only what
    it is dequantised to, after rounding to the dtype that it was made from); every other operation raises
    NotImplementedError. It has no gradient: an operation refuses one that requires it. torch.compile does not trace it.

    >>> weight = QuantizedWeight.int8(torch.tensor([[127.0, 1.0], [2.0, 0.0]]))
    >>> weight.nbytes, weight.dequantize()
    (12, tensor([[127.,   1.],
            [  2.,   0.]]))
    """

    codes: Tensor
    scale: Tensor
    columns: Tensor | None
    source: torch.dtype

    @staticmethod
    def __new__(
        cls, codes: Tensor, scale: Tensor, columns: Tensor | None, source: torch.dtype, dtype: torch.dtype | None = None
    ) -> QuantizedWeight:
        """Use `nf4`, `fp8` or `int8`.

        codes: codes of whole rows, uint8 [out, width / 2] for NF4, else float8_e4m3fn or int8 [out, width]. scale:
        float32 [out, width / 64] for NF4, else [out, 1] or [1, 1]. columns: int64 [in], those of the width that the
        weight has; None for all. source: what entries are rounded to; dtype: what they are cast to then.
        """
        width = codes.shape[1] * (2 if codes.dtype == torch.uint8 else 1)
        size = (codes.shape[0], width if columns is None else columns.shape[0])
        made = Tensor._make_wrapper_subclass(cls, size, dtype=dtype or source, device=codes.device)
        made.codes, made.scale, made.columns, made.source = codes, scale, columns, source
        return made

    @classmethod
    @typed
    def nf4(cls, weight: Tensor) -> QuantizedWeight:
        """Quantises a floating weight [out, in] to 4-bit NormalFloat with a scale per 64 weights of a row.

        Raises ValueError unless `in` is a multiple of 64, ImportError without bitsandbytes, which does it.
        """
        _check(weight)
        if weight.shape[1] % BLOCK:
            raise ValueError(
                f"weight has shape {list(weight.shape)}, and NF4 takes rows of a multiple of {BLOCK}: use fp8 or int8."
            )
        given = weight.detach().contiguous()
        if given.dtype == torch.float64:
            given = given.float()
        packed, state = _bitsandbytes().quantize_4bit(given, blocksize=BLOCK, quant_type="nf4")
        n_out, n_in = weight.shape
        return cls(packed.view(n_out, n_in // 2), state.absmax.view(n_out, n_in // BLOCK), None, weight.dtype)

    @classmethod
    @typed
    def fp8(cls, weight: Tensor, *, per: str = "row") -> QuantizedWeight:
        """Quantises a floating weight [out, in] to float8_e4m3fn with a scale per "row" or one per "tensor"."""
        if per not in ("row", "tensor"):
            raise ValueError(f"per is {per!r}: use 'row' or 'tensor'.")
        return cls._scaled(weight, torch.float8_e4m3fn, 1 if per == "row" else (0, 1))

    @classmethod
    @typed
    def int8(cls, weight: Tensor) -> QuantizedWeight:
        """Quantises a floating weight [out, in] to int8 with a scale per row, symmetric."""
        return cls._scaled(weight, torch.int8, 1)

    @classmethod
    def _scaled(cls, weight: Tensor, dtype: torch.dtype, over: int | tuple[int, int]) -> QuantizedWeight:
        _check(weight)
        values = weight.detach().float().contiguous()
        scale = values.abs().amax(over, keepdim=True) / _LARGEST[dtype]
        # Rows of zeros have a scale of zero, and codes of zero.
        shares = (values / torch.where(scale == 0, 1, scale)).clamp_(-_LARGEST[dtype], _LARGEST[dtype])
        return cls((shares.round_() if dtype == torch.int8 else shares).to(dtype), scale, None, weight.dtype)

    @classmethod
    def from_bitsandbytes(cls, parameter: Any) -> QuantizedWeight:
        """The weight of a bitsandbytes `Linear4bit`, whose codes are shared.

        Raises ValueError for another form than NF4 in blocks of 64 within rows, as it lies before bitsandbytes runs it
        on a CPU.
        """
        state = getattr(parameter, "quant_state", None)
        if state is None or state.quant_type != "nf4" or state.blocksize != BLOCK or state.shape[-1] % BLOCK:
            raise ValueError(f"only bitsandbytes' NF4 in blocks of {BLOCK} within rows is taken: quantise it so.")
        if getattr(state, "packing_format_for_cpu", False):
            raise ValueError("bitsandbytes has packed this weight anew for its CPU kernels: take it before it runs.")
        absmax = state.absmax
        if state.nested:
            absmax = _bitsandbytes().dequantize_blockwise(absmax, state.state2) + state.offset
        n_out, n_in = state.shape
        packed = parameter.detach().as_subclass(Tensor).view(n_out, n_in // 2)
        return cls(packed, absmax.float().view(n_out, n_in // BLOCK), None, state.dtype)

    @property
    def parts(self) -> tuple[Tensor, ...]:
        """The tensors that hold it: codes, scales and, where it has lost columns, those that are left."""
        return (self.codes, self.scale) if self.columns is None else (self.codes, self.scale, self.columns)

    @property
    def nbytes(self) -> int:  # type: ignore[override]  # nothing sets it
        """What its parts take."""
        return sum(part.nbytes for part in self.parts)

    def dequantize(self) -> Tensor:
        """The floating weight [out, in] in this tensor's dtype, new in memory. Raises ImportError as `nf4` does."""
        codes, scale = self.codes, self.scale
        if codes.dtype == torch.uint8:
            values = self._nf4()
        else:
            values = codes.to(torch.float32).mul_(scale)
        values = values.to(self.source)
        if self.columns is not None:
            values = select("compact", values.device, values.dtype).module.compact(values, None, self.columns)
        return values.to(self.dtype)

    def _nf4(self) -> Tensor:
        """Whole rows of NF4 in floating point, by bitsandbytes."""
        codes, functional = self.codes, _bitsandbytes()
        shape = torch.Size((codes.shape[0], 2 * codes.shape[1]))
        dtype = self.source if self.source in _DIRECT else torch.float32
        if shape.numel() == 0:
            return codes.new_empty(shape, dtype=dtype)
        state = functional.QuantState(self.scale.flatten(), shape, blocksize=BLOCK, quant_type="nf4", dtype=dtype)
        # Bytes in one column: a single row would come back transposed.
        return functional.dequantize_4bit(codes.reshape(-1, 1), state)

    def kept(self, rows: Tensor | None, columns: Tensor | None) -> QuantizedWeight:
        """The weight of these rows and columns (int64, None for all), with exactly the entries that they have now.

        Rows leave the codes. So do columns, but not of NF4, because blocks with one scale run along them: they are left
        out of what `dequantize` returns.
        """
        codes, scale = self.codes, self.scale
        held = codes.view(torch.uint8)  # float8 has no gather of its own on every device
        if rows is not None:
            held = held.index_select(0, rows)
            scale = scale if scale.shape[0] != self.shape[0] else scale.index_select(0, rows)
        if columns is not None and codes.dtype != torch.uint8:
            held, columns = held.index_select(1, columns), None
        elif columns is not None and self.columns is not None:
            columns = self.columns.index_select(0, columns)
        return self._with(held.view(codes.dtype), scale, self.columns if columns is None else columns)

    def _with(
        self, codes: Tensor, scale: Tensor, columns: Tensor | None, dtype: torch.dtype | None = None
    ) -> QuantizedWeight:
        return QuantizedWeight(codes, scale, columns, self.source, dtype or self.dtype)

    def _map(self, change: Callable[[Tensor], Tensor], dtype: torch.dtype | None = None) -> QuantizedWeight:
        columns = None if self.columns is None else change(self.columns)
        return self._with(change(self.codes), change(self.scale), columns, dtype)

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        kind = "nf4" if self.codes.dtype == torch.uint8 else str(self.codes.dtype).removeprefix("torch.")
        return f"QuantizedWeight({kind}, {list(self.shape)}, {self.dtype}, {self.device})"

    # What torch asks of a tensor that consists of others

    def __tensor_flatten__(self) -> tuple[list[str], tuple[torch.dtype, torch.dtype]]:
        names = ["codes", "scale"] if self.columns is None else ["codes", "scale", "columns"]
        return names, (self.source, self.dtype)

    @classmethod
    def __tensor_unflatten__(cls, inner: dict[str, Tensor], kinds: Any, size: Any, stride: Any) -> QuantizedWeight:
        source, dtype = kinds
        return cls(inner["codes"], inner["scale"], inner.get("columns"), source, dtype)

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.linear:
            return _linear(*args, **kwargs)
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        aten, kwargs = torch.ops.aten, kwargs or {}
        weight = args[0] if args else None
        if isinstance(weight, QuantizedWeight):
            if func in (aten.detach.default, aten.alias.default):
                return weight._map(lambda part: part)
            if func is aten.clone.default:
                return weight._map(torch.clone)
            if func is aten._to_copy.default:
                where = {key: kwargs[key] for key in ("device", "non_blocking") if kwargs.get(key) is not None}
                return weight._map(lambda part: part.to(**where) if where else part, kwargs.get("dtype"))
        raise NotImplementedError(f"{func} is not defined for a quantised weight: call its dequantize() first.")


def dense(weight: Tensor) -> Tensor:
    """A weight as products read it: a quantised one dequantised, any other as it is."""
    return weight.dequantize() if isinstance(weight, QuantizedWeight) else weight


def refuse_training(weight: Tensor) -> None:
    """Raise ValueError for a quantised weight that requires a gradient, RuntimeError for one that a compiler traces."""
    if not isinstance(weight, QuantizedWeight):
        return
    if torch.compiler.is_compiling():
        raise RuntimeError("torch.compile does not trace a quantised weight: dequantize() it, or do not compile.")
    if weight.requires_grad:
        raise ValueError("weight is quantised and requires a gradient: freeze it, or dequantize() it to train it.")


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x W^T + bias for a module that knows nothing of quantised weights."""
    refuse_training(weight)
    device = x.device.type
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        x, weight, bias = x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
    return _Linear.apply(x, weight, bias)


class _Linear(torch.autograd.Function):
    """A linear on a frozen weight, which is dequantised in both passes."""

    @staticmethod
    def forward(ctx, x, weight, bias):
        ctx.save_for_backward(weight)
        ctx.shape = x.shape
        return F.linear(x, dense(weight), bias)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        (weight,) = ctx.saved_tensors
        need_x, _, need_bias = ctx.needs_input_grad
        rows = matrix(grad)
        d_x = torch.mm(rows, dense(weight)).view(ctx.shape) if need_x else None
        return d_x, None, rows.sum(0) if need_bias else None


def _check(weight: Tensor) -> None:
    if weight.ndim != 2 or not weight.is_floating_point() or isinstance(weight, QuantizedWeight):
        raise ValueError(f"weight must be a 2-D floating tensor, not {weight.dtype} of shape {list(weight.shape)}.")


def _bitsandbytes() -> Any:
    try:
        from bitsandbytes import functional
    except ImportError as error:
        raise ImportError("NF4 weights need bitsandbytes: pip install 'bitsandbytes>=0.50,<1'.") from error
    return functional
