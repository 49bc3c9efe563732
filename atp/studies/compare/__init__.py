"""`atp compare`: ATP and other systems on the same splits, training tokens, LoRA and share of parameters."""

from typing import TYPE_CHECKING

from atp.ground.lazy import lazily

if TYPE_CHECKING:
    from atp.studies.compare.comparison import Comparison

__all__ = ["Comparison"]
__getattr__ = lazily(__name__, comparison="Comparison")
