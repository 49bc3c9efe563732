"""Keeps secrets of the environment out of what is shown and written."""

from __future__ import annotations

import os
import re

_NAMES = re.compile(r"(TOKEN|KEY|SECRET|PASSWORD|PASSWD)$", re.IGNORECASE)
_SHORTEST = 8  # a shorter value is more likely a switch, and would be found in the middle of words


def redacted(text: str) -> str:
    """The text with `***` for each value of an environment variable whose name ends as HF_TOKEN or WANDB_API_KEY do."""
    values = {value.strip() for name, value in os.environ.items() if _NAMES.search(name)}
    for secret in sorted((value for value in values if len(value) >= _SHORTEST), key=len, reverse=True):
        text = text.replace(secret, "***")
    return text
