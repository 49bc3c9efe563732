"""What oneDNN keeps of the products that it has compiled: in 16 bits on a CPU, one for each shape."""

from __future__ import annotations

import math

from atp.plan.job import Workload
from atp_kernels import PRODUCTS_HELD

BYTES = 280 * 1024  # of each, as measured
OF_STEPS = 3 + 5 + 3  # of a linear with its adapter: a LoRA step forward and backward, and the certificate's windows


def compiled_bytes(job: Workload, batches: int) -> int:
    """Bytes of the products of the cut model after its LoRA steps, and after so many batches of test samples.

    The cut leaves each layer a width of its own where layers may differ: of the structure that makes up the rest of a
    budget, since saliency hardly removes any other. Each batch of questions has a length of its own; those of windows
    share one. Padded batches of training have about as many lengths as an average sample has tokens.
    """
    shapes = job.shapes
    layers = 1 if job.config.decisions.uniform else shapes.layers
    linears = shapes.kept[0].linears
    products = batches * layers * len(linears)
    if job.phases.tune:
        own = {cut.module for s in shapes.space.layer(0) if s.remainder for cut in s.cuts} & linears.keys()
        sizes = {name: (linear.out_features, linear.in_features) for name, linear in linears.items()}
        rest = {size for name, size in sizes.items() if name not in own}
        lengths = min(math.ceil(job.sample), job.phases.tune) if job.config.data.packing == "padded" else 1
        products += OF_STEPS * lengths * (layers * len({sizes[name] for name in own}) + len(rest))
    return min(products, PRODUCTS_HELD) * BYTES
