"""Which families can be cut in which spaces: the lists in docs/model.md, and the answer for any `model_type`."""

from __future__ import annotations

import re

from atp.families import FAMILIES, ExpertFamily
from atp.families.refused import REASONS
from atp.spaces import EXPERT_SPACES, STRUCTURES

_REMEDY = re.compile(r"(: |, so )use \w+$")
UNKNOWN = "nobody has checked which cuts of it are exact"
"""Why a family is refused that has neither a row nor a reason."""


def exact_spaces(name: str) -> list[str]:
    """The spaces in which cuts of a supported family are exact."""
    family = FAMILIES[name]
    own = isinstance(family, ExpertFamily)
    return [space for space in STRUCTURES if (space in EXPERT_SPACES) == own and space not in family.inexact]


def support(name: str) -> str:
    """Of a `model_type` the spaces that it can be cut in, or why it cannot."""
    return ", ".join(exact_spaces(name)) if name in FAMILIES else REASONS.get(name, UNKNOWN)


def family_table() -> str:
    """The supported families as a table in Markdown, with the reason against each space that is left out."""
    rows = ["| `model_type` | models | spaces | why not the others |", "|---|---|---|---|"]
    for family in FAMILIES.values():
        whole = not family.inexact and not isinstance(family, ExpertFamily)
        spaces = "all" if whole else ", ".join(f"`{space}`" for space in exact_spaces(family.name))
        # What follows the reason is the remedy for whoever chose the space, which the column before says here.
        reasons = {space: _REMEDY.sub("", reason) for space, reason in family.inexact.items()}
        against = "; ".join(f"{', '.join(names)}: {reason}" for reason, names in _grouped(reasons).items())
        rows.append(f"| `{family.name}` | {family.models} | {spaces} | {against} |")
    return "\n".join(rows)


def refused_list() -> str:
    """The families that are refused with a reason, as a list in Markdown."""
    return "\n".join(f"* {', '.join(names)}: {reason}." for reason, names in _grouped(REASONS).items())


def _grouped(reasons: dict[str, str]) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for name, reason in reasons.items():
        found.setdefault(reason, []).append(f"`{name}`")
    return found
