"""Which backend takes a call: the choice, its explanation and its errors."""

import os
import re
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

import atp_kernels
from atp_kernels import call, extension, triton_runtime
from atp_kernels.linear import aten

CPU = torch.device("cpu")


FUSED = ("masked_lora_linear", "rms_norm", "rotary_embedding", "cross_entropy_")
GROUPS = ("group_lasso", "group_lasso_grad_", "group_prox_")
TAKEN = [
    *(("cuda", op, "triton", "reference") for op in (*FUSED, *GROUPS)),
    *(("cpu", op, "native", "reference") for op in ("masked_lora_linear", "kept_lora_linear", "compact", *GROUPS)),
    ("cuda", "kept_lora_linear", "reference", "reference"),
]


@pytest.mark.skipif(not extension.AVAILABLE, reason=str(extension.REASON))
@pytest.mark.skipif(triton_runtime.REASON is not None, reason=str(triton_runtime.REASON))
@pytest.mark.parametrize(("device", "op", "name", "in_float64"), TAKEN)
def test_who_takes_what(device, op, name, in_float64):
    place = torch.device(device)
    assert call.select(op, place, torch.bfloat16)[1:] == (name, f"first choice on {device}")
    assert call.select(op, place, torch.float64)[1] == in_float64


@pytest.mark.skipif(triton_runtime.REASON is not None, reason=str(triton_runtime.REASON))
def test_what_is_explained_and_refused_on_a_cpu():
    """Native group operations copy their table from the host: under "auto" a captured step would raise."""
    assert all(call.OPERATIONS[op].order["cuda"].backends == ("triton", "native", "reference") for op in GROUPS)
    for op in ("masked_lora_linear", "masked_lora_swiglu", "masked_lora_qkv", "kept_lora_linear", "lora_dropout"):
        chosen = call.select(op, CPU, torch.float32)
        said = f"{op} on cpu in float32 runs on {chosen.name} ({chosen.why})."
        assert atp_kernels.explain(op, torch.ones(1)) == said
    with pytest.raises(RuntimeError, match="the native backend has kept_lora_linear for cpu only|was not built"):
        call.select("kept_lora_linear", torch.device("cuda"), torch.float32, "native")
    assert atp_kernels.available_backends()["reference"] is None


@pytest.mark.skipif(triton_runtime.REASON is not None, reason=str(triton_runtime.REASON))
def test_linear_on_cuda_takes_triton_only_where_there_is_something_to_fuse():
    cuda = torch.device("cuda")
    assert call.select("masked_lora_linear", cuda, torch.bfloat16)[1] == "triton"
    _, name, why = call.select("masked_lora_linear", cuda, torch.bfloat16, plain=True)
    assert name == "reference" and "the addmm_ chain" in why
    assert call.select("masked_lora_linear", cuda, torch.bfloat16, "triton", plain=True)[1] == "triton"
    assert "first choice on cpu" in atp_kernels.explain("masked_lora_linear", torch.ones(1), plain=True)


def test_calls_say_whether_they_are_plain(monkeypatch):
    """Masks or dropout make a call that a fused kernel may take; each of them alone is enough."""
    asked = []

    def noting(*arguments, plain):
        asked.append(plain)
        return call.Choice(aten, "reference", "")

    monkeypatch.setattr(sys.modules["atp_kernels.linear.op"], "select", noting)
    x, weight, lora_a, lora_b = (torch.ones(size) for size in ((2, 4), (3, 4), (1, 4), (3, 1)))
    for options in (
        {}, {"out_mask": torch.ones(3)}, {"in_mask": torch.ones(4)}, {"dropout": 0.5, "seed": 1}
    ):  # fmt: skip
        atp_kernels.masked_lora_linear(x, weight, lora_a, lora_b, scaling=1.0, **options)
    assert asked == [True, False, False, False]


def test_a_backend_that_is_not_there_is_passed_over_and_refused_by_name(monkeypatch):
    monkeypatch.setattr(extension, "AVAILABLE", False)
    monkeypatch.setattr(extension, "REASON", "the extension was not built")
    call._select.cache_clear()
    try:
        _, name, why = call.select("compact", CPU, torch.float32)
        assert (name, why) == ("reference", "native: the extension was not built")
        with pytest.raises(RuntimeError, match="'native' cannot take compact: the extension was not built"):
            atp_kernels.compact(torch.ones(2, 2), backend="native")
    finally:
        call._select.cache_clear()


@pytest.mark.parametrize(
    ("op", "dtype", "backend", "error", "message"),
    [
        ("masked_lora_linear", torch.float32, "cuda", ValueError, "backend='cuda' is not a backend: use one of auto"),
        ("masked_linear", torch.float32, "auto", ValueError, "unknown operation 'masked_linear': use one of"),
        ("compact", torch.float32, "triton", RuntimeError, "triton"),
        ("masked_lora_linear", torch.float64, "triton", RuntimeError, "triton"),
    ],
)
def test_named_backends_that_cannot_take_a_call(op, dtype, backend, error, message):
    with pytest.raises(error, match=message):
        call.select(op, CPU, dtype, backend)


def test_environment_overrides_auto_but_not_a_name(monkeypatch, request):
    request.addfinalizer(call.override.cache_clear)
    monkeypatch.setenv("ATP_KERNELS_BACKEND", "reference")
    call.override.cache_clear()
    module, name, why = call.select("compact", CPU, torch.float32)
    assert module.__name__.endswith(".aten")
    assert (name, why) == ("reference", "ATP_KERNELS_BACKEND='reference' names it")
    monkeypatch.setenv("ATP_KERNELS_BACKEND", "nothing")
    call.override.cache_clear()
    assert call.select("compact", CPU, torch.float32, "reference")[1] == "reference"
    with pytest.raises(ValueError, match="ATP_KERNELS_BACKEND='nothing' is not a backend"):
        atp_kernels.explain("compact")


def told(code, **variables):
    """What a process says that runs this code; a variable of None is not set there."""
    found = {name: value for name, value in (os.environ | variables).items() if value is not None}
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, env=found)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_import_needs_torch_alone():
    """With triton hidden, the package imports, says so, and the other backends work."""
    code = (
        "import sys, importlib.util as u\n"
        "find = u.find_spec\n"
        "u.find_spec = lambda name, *rest: None if name == 'triton' else find(name, *rest)\n"
        "import atp_kernels, torch\n"
        "assert 'triton' not in sys.modules\n"
        "assert 'pip install triton' in atp_kernels.available_backends()['triton']\n"
        "print(atp_kernels.compact(torch.ones(2, 2), torch.tensor([0]), backend='reference').shape)\n"
    )
    assert told(code) == "torch.Size([1, 2])\n"


@pytest.mark.skipif(torch.cuda.is_available(), reason="is about machines without a GPU")
def test_triton_named_without_a_gpu_is_one_sentence():
    code = (
        "import torch, atp_kernels as k\n"
        "print(k.available_backends()['triton'])\n"
        "x, w, a, b = torch.ones(2, 4), torch.ones(3, 4), torch.ones(1, 4), torch.ones(3, 1)\n"
        "try: k.masked_lora_linear(x, w, a, b, scaling=1.0)\n"
        "except RuntimeError as error: print(error)\n"
    )
    listed, error = told(code, TRITON_INTERPRET=None, ATP_KERNELS_BACKEND="triton").splitlines()
    assert "no CUDA device" in listed and "no CUDA device" in error
    assert "ATP_KERNELS_BACKEND='triton' cannot take masked_lora_linear" in error


def test_an_interpreter_that_fails_is_one_sentence():
    """Triton 3.6's reads numbers as NumPy 2.4 forbids, and the first kernel with a loop would say so."""
    code = (
        "from triton.runtime import interpreter\n"
        "def fail(self, *args, **kwargs): raise TypeError('only 0-dimensional arrays')\n"
        "interpreter.GridExecutor.__call__ = fail\n"
        "import atp_kernels, torch\n"
        "print(atp_kernels.available_backends()['triton'])\n"
        "print(atp_kernels.explain('rms_norm', torch.ones(1)))\n"
    )
    found = told(code, TRITON_INTERPRET="1")
    said = r"fails with NumPy .* \(.*only 0-dimensional arrays.*\); install a newer triton or an older numpy, or"
    assert re.match(f"the interpreter of Triton .* {said}", found)
    assert "rms_norm on cpu in float32 runs on" in found, "by another backend"


def test_triton_without_what_its_interpreter_needs_is_one_sentence():
    code = (
        "import sys; sys.modules['numpy'] = None\nimport atp_kernels; print(atp_kernels.available_backends()['triton'])"
    )
    assert told(code, TRITON_INTERPRET="1") == "triton does not load without numpy; run pip install numpy\n"


@pytest.fixture
def compiled(monkeypatch):
    """As on a machine with a GPU: Triton compiles, nothing is interpreted."""
    monkeypatch.setattr(triton_runtime, "INTERPRETED", False)
    monkeypatch.setattr(triton_runtime, "REASON", None)


@pytest.fixture
def built_for(monkeypatch):
    """Pretends an extension with CUDA code for some architectures and a device of some capability."""

    def pretend(archs, capability):
        monkeypatch.setattr(extension, "build_info", lambda: {"cuda_archs": archs.split()})
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda place: capability)
        call._select.cache_clear()

    yield pretend
    call._select.cache_clear()


RUNS = [
    ("8.0", (8, 0), True),
    ("8.0", (8, 9), True),  # a later version of its generation
    ("8.0", (9, 0), False),
    ("8.6", (8, 0), False),
    ("9.0a", (9, 0), True),
    ("10.0a", (10, 3), False),  # a letter a ties it to one version
    ("10.0f", (10, 3), True),  # a letter f to one generation
    ("10.0f+PTX", (12, 0), False),
    ("8.0 9.0 10.0+PTX", (12, 0), True),
    ("8.0 9.0 10.0+PTX", (10, 3), True),
    ("8.0 9.0 10.0+PTX", (7, 5), False),
    ("9.0a+PTX", (10, 0), False),
    ("8.0 12.0", (12, 1), True),
    ("Ampere", (8, 0), False),
]


@pytest.mark.skipif(not extension.AVAILABLE, reason=str(extension.REASON))
@pytest.mark.skipif(triton_runtime.REASON is not None, reason=str(triton_runtime.REASON))
@pytest.mark.parametrize(("archs", "capability", "runs"), RUNS)
def test_native_takes_a_gpu_that_it_was_built_for(built_for, archs, capability, runs):
    built_for(archs, capability)
    gpu = torch.device("cuda", 0)
    _, name, why = call.select("compact", gpu, torch.float32)
    assert name == ("native" if runs else "reference")
    listed = call.available_backends(gpu)["native"]
    if runs:
        assert why == "first choice on cuda" and listed is None
        return
    own = ".".join(map(str, capability))
    said = f"built for CUDA {', '.join(archs.split())} and cuda:0 is of capability {own}; reinstall with "
    assert said in why and said in listed and listed.endswith(f"TORCH_CUDA_ARCH_LIST={own}")
    with pytest.raises(RuntimeError, match="cannot take group_lasso: the native backend was built for CUDA"):
        call.select("group_lasso", gpu, torch.float32, "native")
    assert call.select("group_lasso", gpu, torch.float32)[1] == "triton"


@pytest.mark.skipif(not extension.AVAILABLE, reason=str(extension.REASON))
def test_backends_are_listed_for_a_device(built_for, monkeypatch):
    built_for("", (9, 0))
    assert "built without support for cuda" in call.available_backends("cuda:0")["native"]
    assert call.available_backends("meta")["native"] == "the native backend has no code for meta"
    assert call.available_backends("cpu")["native"] is None
    built_for("9.0", (9, 0))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert call.available_backends("cuda")["native"] == "torch sees no CUDA device"


@pytest.mark.skipif(not extension.AVAILABLE, reason=str(extension.REASON))
@pytest.mark.parametrize(
    ("capability", "op", "taken"),
    [
        ((7, 5), "group_lasso", "reference"),  # neither has code for it
        ((7, 5), "rms_norm", "reference"),
        ((8, 6), "group_lasso", "triton"),
        ((8, 6), "compact", "native"),
        ((10, 3), "compact", "native"),  # from the PTX of 10.0
        ((12, 0), "compact", "native"),
        ((12, 0), "rms_norm", "triton"),
    ],
)
@pytest.mark.usefixtures("compiled")
def test_backends_of_the_default_build_by_capability(built_for, capability, op, taken):
    built_for("8.0 9.0 10.0+PTX", capability)
    _, name, why = call.select(op, torch.device("cuda", 0), torch.bfloat16)
    assert name == taken
    if taken == "reference":
        assert "triton: the triton backend needs CUDA capability 8.0 and cuda:0 is of 7.5" in why
    if (op, taken) == ("group_lasso", "reference"):
        assert "native: the native backend was built for CUDA 8.0, 9.0, 10.0+PTX and cuda:0 is of " in why


@pytest.mark.skipif(not extension.AVAILABLE, reason=str(extension.REASON))
@pytest.mark.usefixtures("compiled")
def test_rocm_takes_triton_whatever_the_extension_was_built_for(built_for, monkeypatch):
    """gfx942 calls itself capability 9.4, which is no CUDA version."""
    built_for("8.0 9.0 10.0+PTX", (9, 4))
    monkeypatch.setattr(torch.version, "hip", "7.1")
    _, name, why = call.select("group_lasso", torch.device("cuda"), torch.bfloat16)
    assert (name, why) == ("triton", "first choice on cuda")
    assert call.available_backends("cuda")["triton"] is None
    _, name, why = call.select("compact", torch.device("cuda"), torch.bfloat16)
    assert (name, why) == ("reference", "native: the native backend has no code for ROCm")


@pytest.mark.usefixtures("compiled")
def test_rdna_takes_triton_for_all_but_products(monkeypatch):
    """Waves of 32 lanes leave too few registers for the tiles of products; CDNA's have 64."""
    monkeypatch.setattr(torch.version, "hip", "7.1")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for lanes, name in ((32, "reference"), (64, "triton")):
        monkeypatch.setattr(
            torch.cuda, "get_device_properties", lambda _, lanes=lanes: SimpleNamespace(warp_size=lanes)
        )
        call._select.cache_clear()
        chosen = call.select("masked_lora_linear", torch.device("cuda"), torch.bfloat16)
        assert chosen.name == name and ("whose waves have 32 lanes" in chosen.why) == (lanes == 32)
        assert call.select("masked_lora_swiglu", torch.device("cuda"), torch.bfloat16).name == "triton"
    call._select.cache_clear()


@pytest.mark.usefixtures("compiled")
def test_other_devices_take_the_reference():
    for op in call.OPERATIONS:
        assert call.select(op, torch.device("xpu"), torch.bfloat16)[1:] == ("reference", "first choice on xpu")
    assert "runs on cuda, not on xpu" in call.available_backends("xpu")["triton"]
