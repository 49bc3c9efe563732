"""Evaluation of any causal LM: perplexity by document, answers by likelihood and by generation, speed and size."""

from atp.evaluation.perplexity import packed_windows, perplexity, sliding_windows
from atp.evaluation.relative import relative_performance
from atp.evaluation.speed import model_size, throughput, throughputs
from atp.evaluation.suite import evaluate_model

__all__ = [
    "evaluate_model",
    "model_size",
    "packed_windows",
    "perplexity",
    "relative_performance",
    "sliding_windows",
    "throughput",
    "throughputs",
]
