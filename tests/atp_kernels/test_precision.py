"""Which float32 precision the Triton kernels take, whoever set it: torch's older call, its newer one, or both."""

import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from atp_kernels import triton_runtime

if not triton_runtime.AVAILABLE:
    pytest.skip(triton_runtime.REASON, allow_module_level=True)

# A process of its own, because the precision is global and torch refuses its older call once the newer one was used.
CODE = """
import sys, torch, conftest
from atp_kernels import masked_lora_linear
from atp_kernels.linear import triton as launcher
device = "cuda" if torch.cuda.is_available() else "cpu"
for setting in sys.argv[1:]:
    exec(setting)
    taken = []
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        x, weight, lora_a, lora_b = (
            torch.ones(size, dtype=dtype, device=device) for size in ((2, 4), (3, 4), (1, 4), (3, 1))
        )
        mask = torch.tensor([True, False, True], device=device)
        y = masked_lora_linear(x.requires_grad_(), weight, lora_a, lora_b, scaling=1.0, out_mask=mask, backend="triton")
        y.sum().backward()
        assert y.tolist() == [[8, 4, 8]] * 2 and x.grad.tolist() == [[5] * 4] * 2
        taken.append(launcher.numerics(x)["PRECISION"])
    print(*taken)
"""
OLDER = {
    "pass": "ieee",
    "torch.set_float32_matmul_precision('high')": "tf32",
    "torch.backends.cuda.matmul.allow_tf32 = False": "ieee",
    "torch.backends.cuda.matmul.allow_tf32 = True": "tf32",
}
NEWER = {
    "torch.backends.fp32_precision = 'tf32'": "tf32",
    "torch.backends.cuda.matmul.fp32_precision = 'ieee'": "ieee",
    "torch.backends.cudnn.conv.fp32_precision = 'tf32'": "ieee",
    "torch.backends.cuda.matmul.fp32_precision = 'tf32'": "tf32",
}
MIXED = {
    "torch.set_float32_matmul_precision('medium')": "tf32",
    "torch.backends.cuda.matmul.fp32_precision = 'ieee'": "ieee",
    "torch.set_float32_matmul_precision('highest')": "ieee",
    "torch.backends.fp32_precision = 'tf32'": "ieee",
}


@pytest.mark.parametrize("settings", [OLDER, NEWER, MIXED], ids=["older", "newer", "mixed"])
def test_precision_is_that_of_torch_s_own_products(settings):
    folder = os.path.dirname(os.path.dirname(__file__))
    variables = os.environ | {"PYTHONPATH": os.pathsep.join([folder, os.environ.get("PYTHONPATH", "")])}
    done = subprocess.run([sys.executable, "-c", CODE, *settings], capture_output=True, text=True, env=variables)
    assert done.stdout.splitlines() == [f"{expected} ieee ieee" for expected in settings.values()], done.stderr


@pytest.mark.parametrize(("arch", "precision"), [("gfx942:sramecc+", "tf32"), ("gfx950", "ieee"), ("gfx90a", "ieee")])
def test_tf32_on_amd_is_for_the_gpu_whose_kernels_take_it(monkeypatch, arch, precision):
    """As in Triton's own list of what each target allows; others do not compile."""
    from triton.backends.amd.compiler import HIPBackend
    from triton.backends.compiler import GPUTarget

    from atp_kernels.linear.triton import numerics

    name = arch.partition(":")[0]
    allowed = HIPBackend(GPUTarget("hip", name, 64)).parse_options({"arch": name}).allowed_dot_input_precisions
    assert ("tf32" in allowed) == (precision == "tf32")
    monkeypatch.setattr(triton_runtime, "INTERPRETED", False)
    monkeypatch.setattr(torch.version, "hip", "7.1")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(gcnArchName=arch))
    monkeypatch.setattr(torch.backends.cuda, "matmul", SimpleNamespace(fp32_precision="tf32"))
    assert numerics(torch.ones(1))["PRECISION"] == precision
