"""Evaluation: perplexity, question answering by likelihood, speed and size of any causal LM."""

from atp.evaluation.perplexity import perplexity
from atp.evaluation.speed import model_size, throughput
from atp.evaluation.suite import evaluate_model
from atp.evaluation.tasks import label_accuracy

__all__ = ["evaluate_model", "label_accuracy", "model_size", "perplexity", "throughput"]
