"""The model class of a cut model: per-layer widths, known to transformers once this package is imported."""

from atp.models.config import ATPLlamaConfig, LayerShape
from atp.models.llama import ATPLlamaForCausalLM, ATPLlamaModel, register

__all__ = ["ATPLlamaConfig", "ATPLlamaForCausalLM", "ATPLlamaModel", "LayerShape", "register"]

register()
