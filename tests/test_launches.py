"""What a run launches on a GPU compiles as it is launched, on a machine without one."""

import functools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
TESTS = Path(__file__).parent
OTHER = os.environ.get("ATP_TESTS_TRITON", "")
"""A folder with another release, of `pip install --no-deps --target FOLDER triton==3.6.0`."""
needs_other = pytest.mark.skipif(not OTHER, reason="ATP_TESTS_TRITON names no folder with another Triton")
SHARED_LIMIT = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024, 120: 99 * 1024}
MASKED_PRODUCTS = ("masked_lora_gemm_kernel", "masked_lora_descriptor_kernel")
KERNELS = {
    "column_reduce", "cross_entropy", "dropout", "gated", "gated_backward", "group_norms", "lora_down",
    "masked_lora_descriptor", "masked_lora_gemm", "rms_norm", "rms_norm_backward", "rotary", "scale", "slot_squares",
    "sum_partials", "total", "weight_grad",
}  # fmt: skip


def python(*arguments, first=""):
    """Python without Triton's interpreter, with the release of Triton in a folder before all others."""
    variables = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    variables["PYTHONPATH"] = os.pathsep.join(part for part in (first, variables.get("PYTHONPATH")) if part)
    done = subprocess.run([sys.executable, *arguments], capture_output=True, text=True, env=variables, cwd=TESTS.parent)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stdout


@functools.cache
def launches(run, capability=90, first=""):
    return json.loads(python("tests/launches.py", run, "--capability", str(capability), first=first))


def masked_products(found, *phases):
    """The launches of products by a masked weight, in these phases of a run or in all of it."""
    return [one for one in found if one["kernel"] in MASKED_PRODUCTS and (not phases or one["phase"] in phases)]


def check(found, capability):
    assert found
    for launch in found:
        first, *rest = launch["grid"]
        assert 0 < first < 2**31 and all(0 < size <= 65535 for size in rest), launch
        assert launch["shared"] <= SHARED_LIMIT[capability], launch
        # Releases of Triton differ in what they take where nothing is said.
        assert launch["options"]["enable_fp_fusion"] is True, launch


def test_a_default_run():
    found = launches("default")
    check(found, 90)
    assert {launch["phase"] for launch in found} == {"open", "freeze", "cut", "tune"}
    assert not masked_products(found, "open", "tune"), "a step that observes masks nothing, and a cut model has no mask"
    assert masked_products(found, "freeze") and masked_products(found, "cut"), "the refit and the certificate have"
    assert {"cross_entropy_kernel", "rotary_kernel"} <= {launch["kernel"] for launch in found}
    for phase in ("open", "tune"):
        norms = [one["arguments"] for one in found if one["kernel"] == "rms_norm_kernel" and one["phase"] == phase]
        joined = [arguments["output_ptr"] != "None" for arguments in norms]
        assert sum(joined) == len(joined) / 2, "of two norms in a layer one takes in the residual connection"


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("capability", [80, 90, 100, 120])
def test_all_kernels_on_every_generation(capability):
    runs = {run: launches(run, capability) for run in ("default", "learned", "calls")}
    for found in runs.values():
        check(found, capability)
    without = {"masked_lora_descriptor"} if capability == 80 else set()
    kernels = {launch["kernel"].removesuffix("_kernel") for found in runs.values() for launch in found}
    assert kernels == KERNELS - without
    assert not masked_products(runs["learned"], "settle", "tune"), "slices take the place of hard masks"
    assert masked_products(runs["learned"], "search")


@pytest.mark.slow
@needs_other
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("capability", [80, 90])
def test_another_release_of_triton_launches_the_same(capability):
    for run in ("default", "learned", "calls"):
        ours, theirs = (launches(run, capability, first) for first in ("", OTHER))
        check(theirs, capability)
        assert [one | {"shared": 0} for one in theirs] == [one | {"shared": 0} for one in ours]


@pytest.mark.slow
@needs_other
@pytest.mark.timeout(1800)
def test_another_release_of_triton_passes_the_gate():
    python("-m", "atp_kernels.offline", "--gate", "--dtype", "bf16", "--rank", "64", first=OTHER)


@pytest.mark.slow
@needs_other
def test_the_interpreter_of_another_release_works_or_is_refused():
    """That of 3.6 fails with NumPy 2.4, of which a sentence tells before the first kernel does."""
    code = (
        "import os; os.environ['TRITON_INTERPRET'] = '1'\n"
        "import torch, atp_kernels\n"
        "reason = atp_kernels.available_backends()['triton']\n"
        "assert reason is None or 'install a newer triton or an older numpy' in reason, reason\n"
        "x = torch.ones(2, 4)\n"
        "if reason is None: atp_kernels.rms_norm(x, x[0], eps=1e-5, backend='triton')\n"
    )
    python("-c", code, first=OTHER)
