"""Models by name: those that `atp_kernels.tune` knows too."""

from atp_kernels.tuning.shapes import MODELS, Model, find_model

__all__ = ["MODELS", "Model", "find_model"]
