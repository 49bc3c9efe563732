"""Keeps secrets out of what is shown and written: those of the environment, and those that were typed."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterator

_NAMES = re.compile(r"[\w.-]*(TOKEN|KEY|SECRET|PASSWORD|PASSWD)", re.IGNORECASE)
_SHORTEST = 8  # a shorter value is more likely a switch, and would be found in the middle of words
# Tokens of the Hub and of Weights & Biases, wherever they come from. Old keys of the latter look like commits.
_TOKENS = re.compile(r"(?<![A-Za-z0-9])(?:(?:hf|api_org)_[A-Za-z0-9]{20,}|wandb_v1_[A-Za-z0-9_-]{20,})")


def redacted(text: str) -> str:
    """The text with `***` for each secret.

    These are the values of environment variables whose names end as HF_TOKEN or WANDB_API_KEY do, those of options of
    the command line with such names (`--token VALUE`, `hub.token=VALUE`), and whatever has the form of a token.
    """
    values = {value.strip() for name, value in (*os.environ.items(), *_typed()) if _NAMES.fullmatch(name)}
    for secret in sorted((value for value in values if len(value) >= _SHORTEST), key=len, reverse=True):
        text = text.replace(secret, "***")
    return _TOKENS.sub("***", text)


def _typed() -> Iterator[tuple[str, str]]:
    """Name and value of each option and override of the command line."""
    for word, after in zip(sys.argv, [*sys.argv[1:], ""], strict=True):
        name, has_value, value = word.partition("=")
        if has_value or word.startswith("-"):
            yield name, value if has_value else after
