"""The model class of a cut model: per-layer widths, known to transformers after `register()`."""

from atp.models.config import ATPLlamaConfig, LayerShape
from atp.models.llama import ATPLlamaForCausalLM, ATPLlamaModel, register

__all__ = ["ATPLlamaConfig", "ATPLlamaForCausalLM", "ATPLlamaModel", "LayerShape", "register"]
