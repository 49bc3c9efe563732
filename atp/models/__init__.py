"""The per-layer model class that a cut model is, and its registration with transformers."""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from atp.models.llama import ATPLlamaConfig, ATPLlamaForCausalLM, ATPLlamaModel

__all__ = ["ATPLlamaConfig", "ATPLlamaForCausalLM", "ATPLlamaModel", "register"]


def register() -> None:
    """Makes `from_pretrained` of the Auto classes know the model type `atp_llama`; calling it again changes nothing."""
    AutoConfig.register(ATPLlamaConfig.model_type, ATPLlamaConfig, exist_ok=True)
    AutoModel.register(ATPLlamaConfig, ATPLlamaModel, exist_ok=True)
    AutoModelForCausalLM.register(ATPLlamaConfig, ATPLlamaForCausalLM, exist_ok=True)
