"""What the processes of a run exchange: bytes of a step, by what is reduced and what is gathered.

As `benchmarks.processes` counts. Numbers and flags that a step also exchanges are left out.
"""

from __future__ import annotations

from collections.abc import Iterator

from atp.plan.job import Workload
from atp.plan.shapes import Layers, adapter_params

_FLOAT = 4  # gradients of what is trained and of a mask, whatever the weights are


def exchange_of(job: Workload) -> list[dict[str, object]]:
    """By phase, for one step of one process: bytes of tensors `reduced` and `gathered`, and of what it sends for them.

    A process sends (N - 1) / N of a gathered tensor and twice that of a reduced one, and receives as much. Decision
    steps are a row of their own. Empty for one process.
    """
    if job.count == 1:
        return []
    share = (job.count - 1) / job.count
    return [
        {"phase": phase, "reduced": reduced, "gathered": gathered, "sent": round(share * (2 * reduced + gathered))}
        for phase, reduced, gathered in _phases(job)
    ]


def _phases(job: Workload) -> Iterator[tuple[str, int, int]]:
    steps, whole, batches = job.phases, job.shapes.whole, job.config.training.gradient_accumulation
    for phase, count, layers in (
        ("open", steps.open, whole), ("search", steps.search, whole), ("settle", steps.settle, whole),
        ("tune", steps.tune, job.shapes.kept),
    ):  # fmt: skip
        if count:
            parameters = adapter_params(layers, job.config.lora)
            if job.config.training.embeddings:
                parameters += job.shapes.config.vocab_size * job.shapes.config.hidden_size
            if phase == "tune" and job.config.training.after_cut == "full":
                parameters = job.after["total"]
            yield phase, parameters * _FLOAT, batches * _gathered(job, layers)
        if count and phase == "search" and job.config.decisions.source == "learned":
            yield "decision", job.shapes.space.size * _FLOAT, _gathered(job, whole)


def _gathered(job: Workload, layers: Layers) -> int:
    """Bytes of the sharded weights that a batch gathers: layers forward and backward, embeddings and head once.

    A head that is tied to the embeddings gathers them once more.
    """
    if not job.shared:
        return 0
    parameters = job.after if layers is job.shapes.kept else job.before
    decoder = sum(parameters[part] for part in ("attention", "mlp", "norms"))
    ends = 2 * job.shapes.config.vocab_size * job.shapes.config.hidden_size
    return (2 * decoder + ends) * job.dtype.itemsize
