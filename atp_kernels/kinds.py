"""Arguments of a wrong kind: `typed` refuses them by the hints of a public function, in one sentence each."""

import inspect
import numbers
from collections.abc import Callable
from functools import cache, wraps
from types import NoneType, UnionType
from typing import Any, ParamSpec, TypeVar, Union, get_args, get_origin, get_type_hints

import torch
from torch import Tensor

P = ParamSpec("P")
R = TypeVar("R")
_KINDS: dict[type, tuple[str, tuple[type, ...]]] = {
    Tensor: ("a dense tensor", (Tensor,)),
    bool: ("True or False", (bool,)),
    int: ("an integer", (numbers.Integral, torch.SymInt)),
    float: ("a number", (numbers.Real, torch.SymInt, torch.SymFloat)),
    str: ("a string", (str,)),
    NoneType: ("None", (NoneType,)),
    torch.dtype: ("a torch.dtype", (torch.dtype,)),
    torch.device: ("a device", (torch.device,)),
}
"""What hints ask for, in words, and what is taken for it."""
_TRANSFORMED = ("functorch transforms", "Batching rule not implemented", "Tensor that doesn't have storage")
"""What torch says of operations that know nothing of torch.func, which has no public way to ask for it."""


def typed(function: Callable[P, R]) -> Callable[P, R]:
    """Decorates a public function: arguments of another kind than its hints say raise TypeError before it runs.

    A compiler, which sees the arguments once, traces the function alone.
    """
    parameters = inspect.signature(function).parameters
    names = list(parameters)
    ordered = [name for name, one in parameters.items() if one.kind in (one.POSITIONAL_ONLY, one.POSITIONAL_OR_KEYWORD)]

    @cache
    def hints() -> dict[str, Any]:  # at the first call, when every class that they name is there
        return {name: hint for name, hint in get_type_hints(function).items() if name in names}

    @wraps(function)
    def checked(*args: P.args, **kwargs: P.kwargs) -> R:
        if not torch.compiler.is_compiling():
            known = hints()
            for name, value in (*zip(ordered, args, strict=False), *kwargs.items()):
                if name in known and not _is_of(value, known[name]):
                    raise TypeError(_refusal(name, value, known[name]))
        try:
            return function(*args, **kwargs)
        except RuntimeError as error:
            if _is_of_transforms(str(error)):  # a comprehension here would be bytecode that torch.compile does not know
                remedy = "use autograd, and a leading dimension in place of vmap"
                raise RuntimeError(
                    f"{function.__name__} takes no part in torch.func (vmap, grad, jvp): {remedy}."
                ) from error
            raise

    return checked


def _is_of_transforms(message: str) -> bool:
    return any(mark in message for mark in _TRANSFORMED)


def _is_of(value: Any, hint: Any) -> bool:
    """Whether a value is of the kind of a hint: a class, a union, or a sequence or tuple of kinds."""
    if hint is Tensor:
        return isinstance(value, Tensor) and value.layout is torch.strided and not value.is_nested
    if hint is Any:
        return True
    origin = get_origin(hint)
    if origin is None:
        if hint is float and isinstance(value, Tensor):  # as `float()` does, but a gradient would be lost
            return value.ndim == 0 and not (value.is_nested or value.is_complex() or value.requires_grad)
        if not isinstance(value, _KINDS[hint][1] if hint in _KINDS else hint):
            return False
        if isinstance(value, bool) and hint in (int, float):
            return False
        return not hasattr(hint, "_fields") or _first_unfit(value, hint) is None
    kinds = get_args(hint)
    if origin in (Union, UnionType):
        return any(_is_of(value, kind) for kind in kinds)
    if not isinstance(value, (list, tuple)):
        return False
    if origin is tuple:  # how many there must be is a question of values
        return all(map(_is_of, value, kinds))
    if kinds == (Tensor,):  # of which there may be hundreds
        return all(issubclass(kind, Tensor) for kind in set(map(type, value)))
    return all(_is_of(entry, kinds[0]) for entry in value)


def _first_unfit(value: Any, kind: Any) -> tuple[str, Any, Any] | None:
    """(name, value, hint) of the first field of a named tuple that is of another kind than its hint says."""
    fields = zip(_fields(kind).items(), value, strict=True)
    return next(((name, entry, hint) for (name, hint), entry in fields if not _is_of(entry, hint)), None)


@cache
def _fields(kind: Any) -> dict[str, Any]:
    return get_type_hints(kind)


def _refusal(name: str, value: Any, hint: Any) -> str:
    if hasattr(hint, "_fields") and isinstance(value, hint):
        field, value, hint = _first_unfit(value, hint) or ("", value, hint)
        name = f"{name}.{field}"
    return f"{name} is {_described(value)}: give {_wanted(hint)}."


def _wanted(hint: Any) -> str:
    """What a hint asks for, in words."""
    origin, kinds = get_origin(hint), get_args(hint)
    if origin in (Union, UnionType):
        return " or ".join(dict.fromkeys(map(_wanted, kinds)))
    if origin is tuple:
        return f"({', '.join(map(_wanted, kinds))})"
    if origin is not None:
        return f"a list of {'tensors' if kinds == (Tensor,) else _wanted(kinds[0])}"
    return _KINDS[hint][0] if hint in _KINDS else f"a {hint.__name__}"


def _described(value: Any) -> str:
    if isinstance(value, Tensor):
        layout = "nested" if value.is_nested else str(value.layout).removeprefix("torch.")
        if layout != "strided":
            return f"a tensor of layout {layout}"
        return f"a tensor of shape {list(value.shape)}{' that requires a gradient' * value.requires_grad}"
    if isinstance(value, (list, tuple)) and value:
        return f"a {type(value).__name__} that starts with {_described(value[0])}"
    if value is None or isinstance(value, (bool, str, int, float)):
        return f"{value!r:.40}"
    return f"of type {type(value).__name__}"
