"""`atp sweep`: several targets from one open phase, and their results as CSV, JSON and PNG."""

from typing import TYPE_CHECKING

from atp.ground.lazy import lazily

if TYPE_CHECKING:
    from atp.studies.sweep.sweep import Sweep

__all__ = ["Sweep"]
__getattr__ = lazily(__name__, sweep="Sweep")
