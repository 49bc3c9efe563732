"""What serving engines call to find the class of a cut model."""

from importlib import import_module

from atp.models.llama import ATPLlamaForCausalLM, register

VLLM_BACKEND = "vllm.model_executor.models.transformers:TransformersForCausalLM"


def register_with_vllm() -> None:
    """vLLM's plugin, which it calls in each of its processes; calling it again changes nothing.

    By itself vLLM runs only those classes by its Transformers backend that transformers exports or that a folder brings
    as code (`auto_map`). Its registry therefore learns that the backend runs ours. The backend is named and not
    imported, because an import would initialize CUDA before vLLM forks.
    """
    register()
    import_module("vllm").ModelRegistry.register_model(ATPLlamaForCausalLM.__name__, VLLM_BACKEND)
