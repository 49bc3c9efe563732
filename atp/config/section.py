"""What all sections of the configuration share: strict keys, and values that a run can use."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict, field_validator

_LARGEST = 2**32 - 1  # the largest NumPy seed, and more than any count needs


class Section(BaseModel):
    """A section of the configuration: unknown keys, infinities and texts that no file can hold are refused."""

    model_config = ConfigDict(extra="forbid", validate_assignment=True, allow_inf_nan=False)

    @field_validator("*")
    @classmethod
    def _is_usable(cls, value: Any) -> Any:
        """Refuses values that their type allows but no run can use."""
        for item in _leaves(value):
            if isinstance(item, int) and item > _LARGEST:
                raise ValueError(f"numbers reach {_LARGEST}")
            if isinstance(item, str):
                if not item.strip():
                    raise ValueError("the text is empty: give a value, or leave the key out")
                if "\0" in item or not _encodes(item):
                    raise ValueError("the text holds characters that no file or path can hold")
        return value


def _leaves(value: Any) -> list[Any]:
    """All values in nested lists, tuples and dictionaries, including keys."""
    if isinstance(value, dict):
        return [leaf for pair in value.items() for part in pair for leaf in _leaves(part)]
    return [leaf for part in value for leaf in _leaves(part)] if isinstance(value, (list, tuple)) else [value]


def _encodes(text: str) -> bool:
    """Whether a text has no lone surrogates."""
    return not any("\ud800" <= character <= "\udfff" for character in text)
