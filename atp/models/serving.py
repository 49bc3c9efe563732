"""What serving engines call to find the classes of cut models."""

from importlib import import_module

from atp.families import FAMILIES
from atp.models.cut import model_classes, register

VLLM_BACKEND = "vllm.model_executor.models.transformers:TransformersForCausalLM"


def register_with_vllm() -> None:
    """vLLM's plugin, which it calls in each of its processes; calling it again changes nothing.

    By itself vLLM runs only those classes by its Transformers backend that transformers exports or that a folder brings
    as code (`auto_map`). Its registry therefore learns that the backend runs ours. The backend is named and not
    imported, because an import would initialize CUDA before vLLM forks.
    """
    register()
    registry = import_module("vllm").ModelRegistry
    for family in FAMILIES:
        registry.register_model(model_classes(family)[1].__name__, VLLM_BACKEND)
