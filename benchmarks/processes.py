"""LoRA steps in one or several processes on a CPU: tokens per second, and the bytes that a step exchanges.

    OMP_NUM_THREADS=2 python -m benchmarks.processes
    OMP_NUM_THREADS=1 torchrun --nproc_per_node 2 -m benchmarks.processes
    OMP_NUM_THREADS=1 torchrun --nproc_per_node 2 -m benchmarks.processes --sharding fsdp

All read the same samples: `--batches` per step, shared among the processes. Bytes are those of the tensors that this
process hands to a reduction or gets from a gathering, beside what `atp.plan.exchange` says; links carry (N - 1) / N of
what is gathered, and twice that of what is reduced. The first step is not timed.
"""

import argparse
import os
import sys
import tempfile
import time
from collections import Counter
from contextlib import ExitStack, contextmanager
from unittest.mock import patch

import torch
import torch.distributed as dist
from transformers import LlamaConfig, LlamaForCausalLM

from atp.config import ATPConfig
from atp.data import PackedDataset
from atp.processes import processes
from atp.sharding import shards
from atp.training.steps import open_step
from atp.training.trainer import ATPTrainer

_SIZES = {
    "vocab_size": 4096, "hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 8, "num_attention_heads": 8,
    "num_key_value_heads": 4,
}  # fmt: skip


def make(folder: str, batches: int, length: int, sharding: str | None) -> ATPTrainer:
    """A trainer of a random model on random windows."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**_SIZES))
    ids = torch.randint(0, _SIZES["vocab_size"], (64, length))
    training = {"open": 10_000, "tune": 1, "precision": "float32", "sharding": sharding,
                "gradient_accumulation": batches // processes.count()}  # fmt: skip
    values = {"model": {"path": "random"}, "output_dir": folder, "training": training, "decisions": {"source": "tuned"}}
    data = PackedDataset(ids, ids.clone())
    return ATPTrainer(ATPConfig.parse(values), model, data, data)


@contextmanager
def counted(trainer: ATPTrainer):
    """Counts the bytes that collectives take and give inside a with block, by kind."""
    found: Counter[str] = Counter()

    def summed(tensor, original=processes.begin_sum):
        found["reduced"] += tensor.nbytes
        return original(tensor)

    def whole(tensor):
        result = shards.whole(tensor)
        found["gathered"] += result.nbytes if processes.sharded() else 0
        return result

    with ExitStack() as stack:
        stack.enter_context(patch.object(processes, "begin_sum", summed))
        name = "all_gather_single" if hasattr(dist, "all_gather_single") else "all_gather_into_tensor"
        gather = getattr(dist, name)

        def gathered(output_tensor, *rest, **options):
            found["gathered"] += output_tensor.nbytes
            return gather(output_tensor, *rest, **options)

        stack.enter_context(patch.object(dist, name, gathered))
        stack.enter_context(patch("atp.training.loss.whole", whole))
        yield found


def planned(trainer: ATPTrainer) -> dict[str, int]:
    """What `atp.plan.exchange` says of a step, in bytes of the same tensors."""
    parameters = list(trainer.model.named_parameters())
    adapter = sum(p.numel() * p.itemsize for n, p in parameters if ".lora_" in n)
    if not processes.sharded():
        return {"reduced": adapter, "gathered": 0}
    layers = sum(p.numel() * p.itemsize for n, p in parameters if ".layers." in n and ".lora_" not in n)
    ends = 2 * _SIZES["vocab_size"] * _SIZES["hidden_size"] * 4
    return {"reduced": adapter, "gathered": trainer.batches_per_step // processes.count() * (2 * layers + ends)}


def main() -> int:
    """Prints one row, of the main process."""
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--steps", type=int, default=8)
    options.add_argument("--batches", type=int, default=4, help="per step, in all processes")
    options.add_argument("--length", type=int, default=256, help="tokens of a window")
    options.add_argument("--sharding", choices=["fsdp"])
    given = options.parse_args()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    processes.start(given.sharding)
    folder = processes.on_main(tempfile.mkdtemp)
    trainer = make(folder, given.batches, given.length, given.sharding)
    batches = trainer.batches_from(0)

    def step() -> None:
        open_step(trainer, trainer.pruning, next(batches))
        trainer.model.zero_grad()

    with counted(trainer) as found:
        step()
        found.clear()
        started = time.perf_counter()
        for _ in range(given.steps):
            step()
        processes.wait()
        seconds = time.perf_counter() - started
    if processes.is_main():
        expected = planned(trainer) if processes.count() > 1 else {}
        exchanged = {kind: (found[kind] / given.steps, size) for kind, size in expected.items()}
        tokens = given.steps * given.batches * given.length
        print(
            f"{processes.count()} processes x {torch.get_num_threads()} threads, {given.sharding or 'whole'}: "
            f"{tokens / seconds:.0f} tokens/s; load {os.getloadavg()[0]:.1f}; "
            + "; ".join(f"{kind} {real:.0f} bytes a step, planned {size}" for kind, (real, size) in exchanged.items())
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
