"""Overrides of a config, and what is said of one that is wrong."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ValidationError

from atp.config.unknown_keys import unknown_key
from atp.ground.errors import InputError, quote, shorten
from atp.ground.reading import read_yaml

_DEEPEST_KEY = 8  # sections in the key of an override


def apply(values: dict[str, Any], override: str) -> None:
    """Sets what an override names in nested settings. Raises `InputError` if its form is not key.path=value."""
    key, equals, text = override.partition("=")
    shown = f"override '{shorten(override)}'"
    if not equals or not key:
        raise InputError(f"{shown} is not of the form key.path=value")
    *parents, last = key.split(".")
    if len(parents) > _DEEPEST_KEY:
        raise InputError(f"{shown}: no config key is nested that deep")
    for parent in parents:
        if values.get(parent) is None:  # a missing section, or null in the file
            values[parent] = {}
        values = values[parent]
        if not isinstance(values, dict):
            raise InputError(f"{shown}: '{shorten(parent)}' is not a section of the config")
    values[last] = read_yaml(text, shown)


def explain(error: ValidationError, root: type[BaseModel]) -> str:
    """The first problem as one sentence: the key's path, what was found, and what was expected or the nearest key."""
    first = error.errors(include_url=False)[0]
    path = [str(part) for part in first["loc"]]
    key = shorten(".".join(path))
    if first["type"] == "extra_forbidden":
        return unknown_key(path, root)
    if first["type"] == "missing":
        return f"config key '{key}' is missing: add it to the YAML file or as {key}=VALUE"
    # pydantic marks errors of our own checks.
    reason = shorten(first["msg"]).removeprefix("Value error, ")
    if not path:  # of several sections, which it names
        return reason
    if first["type"] == "value_error" and len(path) == 1 and _is_section(root, path[0]):
        return f"config section '{key}': {reason[0].lower()}{reason[1:]}"  # of several keys, which it names
    return f"config key '{key}' is {quote(first['input'])}: {reason[0].lower()}{reason[1:]}"


def _is_section(root: type[BaseModel], name: str) -> bool:
    kind = root.model_fields[name].annotation
    return isinstance(kind, type) and issubclass(kind, BaseModel)


def differences(old: Any, new: Any) -> list[tuple[str, Any, Any]]:
    """(key, old, new) of the values in which two sections differ; the key is empty where they are no sections."""
    if isinstance(old, dict) and isinstance(new, dict):
        return [(key, old.get(key), new.get(key)) for key in {**old, **new} if old.get(key) != new.get(key)]
    return [("", old, new)] if old != new else []
