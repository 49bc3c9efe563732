"""The masked linear where the Triton kernels always run, with a chosen tile."""

import pytest
import torch
from backends_here import ON_GPU
from linear_cases import with_gradients

from atp_kernels import masked_lora_linear
from atp_kernels.linear import tiles
from atp_kernels.linear import triton as launcher

# The interpreter cuts a float32 off to bfloat16 where a GPU rounds it.
FACTOR = {torch.float32: 2.0, torch.float16: 2.0, torch.bfloat16: 2.0 if ON_GPU else 3.0}


def run(shape, tensors, config):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(launcher, "_fusion_pays", lambda *operands: True)
        patch.setattr(tiles, "named_tile", lambda dtype: config)
        return with_gradients((masked_lora_linear(**tensors, **shape.options, backend="triton"),), tensors)
