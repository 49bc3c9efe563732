"""The memory of a plan's cut against the tensors that a real cut allocates."""

import pytest
import torch
from torch.profiler import ProfilerActivity, profile, record_function
from transformers import LlamaConfig, LlamaForCausalLM

from atp.config import ATPConfig
from atp.data import PackedDataset
from atp.inputs.resolve import resolve
from atp.plan.job import Workload
from atp.plan.memory import memory_of
from atp.plan.shapes import ModelShapes
from atp.training.trainer import ATPTrainer
from benchmarks.measure import allocated_bytes

LENGTH = 32
SIZES = {
    "wide layers": {"vocab_size": 64, "hidden_size": 128, "intermediate_size": 512},
    "many words": {"vocab_size": 8192, "hidden_size": 32, "intermediate_size": 96},
}


def windows(count):
    ids = torch.randint(0, 64, (count, LENGTH), generator=torch.Generator().manual_seed(0))
    return PackedDataset(ids, ids.clone())


@pytest.mark.parametrize("sizes", SIZES)
def test_the_largest_moment_is_that_of_a_real_cut(tmp_path, sizes, monkeypatch):
    """Weights are most of it where layers are wide, and logits of the certificate where there are many words."""
    config = ATPConfig.parse(
        {
            "model": {"path": "tiny"},
            "output_dir": str(tmp_path),
            "data": {"length": LENGTH},
            "decisions": {"source": "tuned", "multiples": {}, "refit_windows": 0},
            "lora": {"r": 4, "alpha": 4},
            "training": {"open": 1, "search": 0, "settle": 0, "tune": 0, "batch_size": 1, "precision": "float32",
                         "distill": 0.0},
        }
    )  # fmt: skip
    cut = ATPTrainer._cut

    def marked(trainer):
        with record_function("the cut"):
            cut(trainer)

    monkeypatch.setattr(ATPTrainer, "_cut", marked)
    # From the model on: the profiler knows the size of what is freed only where it saw it allocated.
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
        model = LlamaForCausalLM(LlamaConfig(**SIZES[sizes], num_hidden_layers=2, num_attention_heads=4,
                                             num_key_value_heads=2, tie_word_embeddings=True))  # fmt: skip
        shapes = ModelShapes.of(model.config, config.decisions)
        trainer = ATPTrainer(config, model, windows(4), windows(4))
        del model
        trainer.train()
    (span,) = (event for event in found.profiler.kineto_results.events() if event.name() == "the cut")
    peak = max(held for time, held in allocated_bytes(found) if span.start_ns() <= time <= span.end_ns())
    job = Workload.of(resolve(config), shapes, autocast=None, device="cpu")
    rows = {row["phase"]: row["parts"] for row in memory_of(job)}
    planned = sum(size for part, size in rows["cut"].items() if part != "process")
    print(f"planned {planned}, measured {peak}: {rows['cut']}")
    assert 0.9 * peak <= planned <= 1.1 * peak
