"""The configuration of a run: sections, presets, overrides, and the sentences for keys that do not exist."""

from typing import TYPE_CHECKING

from atp.ground.lazy import lazily

if TYPE_CHECKING:
    from atp.config.config import (
        ATPConfig,
        DecisionsConfig,
        EvaluationConfig,
        ExportConfig,
        GeneratorKind,
        LoraVariant,
        ModelConfig,
        VocabularyConfig,
    )
    from atp.config.data import DataConfig
    from atp.config.resolved import Definite, ResolvedConfig
    from atp.config.training import TrainingConfig

__all__ = [
    "ATPConfig", "DataConfig", "DecisionsConfig", "Definite", "EvaluationConfig", "ExportConfig", "GeneratorKind",
    "LoraVariant", "ModelConfig", "ResolvedConfig", "TrainingConfig", "VocabularyConfig",
]  # fmt: skip
__getattr__ = lazily(
    __name__,
    config="ATPConfig DecisionsConfig EvaluationConfig ExportConfig GeneratorKind LoraVariant ModelConfig "
    "VocabularyConfig",
    data="DataConfig", resolved="Definite ResolvedConfig", training="TrainingConfig",
)  # fmt: skip
