"""The layout for the Hugging Face library `kernels`: each build works alone, and the library takes it."""

import ast
import json
import subprocess
import sys

import pytest
from wheels import ROOT, run, search_path

BACKENDS = ("cpu", "cuda", "rocm")


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    folder = tmp_path_factory.mktemp("layout") / "hub"
    script = [sys.executable, str(ROOT / "tools" / "hub_kernel.py"), "--out", str(folder)]
    subprocess.run(script, check=True, capture_output=True)
    return folder


def test_every_build_holds_the_sources_whose_imports_are_relative_or_of_torch_and_triton(hub):
    (source,) = (hub / "torch-ext").iterdir()
    names = {path.relative_to(source).as_posix() for path in source.rglob("*") if path.is_file()}
    assert {"__init__.py", "layers.py", "norm/triton.py", "_C.missing"} <= names and "norm/native.py" not in names
    builds = sorted((hub / "build").iterdir())
    assert [build.name for build in builds] == [f"torch-{backend}" for backend in BACKENDS]
    described = [json.loads((build / "metadata.json").read_text()) for build in builds]
    assert [one["backend"]["type"] for one in described] == list(BACKENDS)
    assert len({one["id"] for one in described}) == 3
    assert all(set(one["digest"]["files"]) == names for one in described)
    allowed = {*sys.stdlib_module_names, "torch", "triton"}
    for path in (hub / "torch-ext").rglob("*.py"):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        late = {node for f in ast.walk(tree) if isinstance(f, ast.FunctionDef) for node in ast.walk(f)}
        for node in ast.walk(tree):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module] if isinstance(node, ast.ImportFrom) and not node.level else []
            found = {name.partition(".")[0] for name in names}
            assert found <= allowed | ({"bitsandbytes"} if node in late else set()), path


ALONE = """
import importlib.util, json, pathlib, sys
import torch

def load(folder):
    name = json.loads((folder / "metadata.json").read_text())["id"]
    spec = importlib.util.spec_from_file_location(name, folder / "__init__.py")
    sys.modules[name] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module

builds = [load(pathlib.Path(folder)) for folder in sys.argv[1:]]
torch.manual_seed(0)
x, weight, a, b = (torch.randn(size, requires_grad=True) for size in ((5, 24), (20, 24), (4, 24), (20, 4)))
keep = torch.arange(20) % 3 > 0

def close(ours, exact):
    torch.testing.assert_close(ours.double(), exact, rtol=1e-5, atol=1e-5)
    grads = [torch.autograd.grad(y.square().sum(), (x, weight)) for y in (ours, exact)]
    for own, other in zip(*grads):
        torch.testing.assert_close(own, other, rtol=1e-4, atol=1e-4)

for build in builds:
    for backend in ("reference", "triton"):
        close(
            build.masked_lora_linear(x, weight, a, b, scaling=0.5, out_mask=keep, backend=backend),
            (x.double() @ weight.double().T) * keep + 0.5 * x.double() @ a.double().T @ b.double().T,
        )
        wide, scale = x.double(), weight[0].double()
        exact = wide / (wide.square().mean(-1, keepdim=True) + 1e-6).sqrt() * scale
        close(build.rms_norm(x, weight[0], eps=1e-6, backend=backend), exact)
    print(build.available_backends()["native"])
    compact = getattr(torch.ops, build.__name__).compact
    print(compact(torch.eye(3), torch.tensor([2]), None, 1, "reference").tolist())
assert "atp_kernels" not in sys.modules
"""


def test_builds_work_alone_and_side_by_side(hub, tmp_path):
    folders = [str(hub / "build" / f"torch-{backend}") for backend in ("cpu", "cuda")]
    search = search_path(tmp_path)  # of python -S: no editable install of this project
    done = run([sys.executable, "-S", "-c", ALONE, *folders], tmp_path, PYTHONPATH=search, TRITON_INTERPRET="1")
    assert done.returncode == 0, done.stderr
    told = done.stdout.splitlines()
    assert told[1] == "[[0.0, 0.0, 1.0]]" and told[:2] == told[2:]
    assert "was not built, since this build for the Hugging Face Hub is Python and Triton alone;" in told[0]


LIBRARY_TAKES_IT = """
import pathlib, sys
import torch
from kernels import LocalLayerRepository, Mode, get_local_kernel, kernelize
from kernels import use_kernel_forward_from_hub, use_kernel_mapping
from kernels._rust import Backend, Build, Digest, DigestAlgorithm, Metadata

hub = pathlib.Path(sys.argv[1])
assert Build.open(hub).general.backends == [Backend.CPU, Backend.CUDA, Backend.ROCm]
for folder in (hub / "build").iterdir():
    described = Metadata.read_from_file(folder / "metadata.json")
    described.digest.validate(Digest.hash_variant(DigestAlgorithm.SHA256, folder))
module = get_local_kernel(hub, backend="cpu")
assert module.__name__ == Metadata.read_from_file(hub / "build" / "torch-cpu" / "metadata.json").id

@use_kernel_forward_from_hub("RMSNorm")
class Norm(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.weight, self.variance_epsilon = torch.nn.Parameter(torch.rand(24) + 0.5), 1e-5
    def forward(self, hidden_states):
        raise AssertionError("not replaced")

@use_kernel_forward_from_hub("MaskedLoRALinear")
class Linear(module.nn.MaskedLoRALinear):
    def forward(self, x):
        raise AssertionError("not replaced")

torch.manual_seed(0)
norm, linear = Norm(), Linear(torch.randn(16, 24), r=4, alpha=8, dropout=0.25)
linear.out_mask = torch.arange(16) % 2 > 0
torch.nn.init.normal_(linear.lora_B)
model = torch.nn.Sequential(norm, linear)
names = ("RMSNorm", "MaskedLoRALinear")
local = {name: {"cpu": LocalLayerRepository(repo_path=hub, layer_name=name)} for name in names}
mode = Mode.TRAINING | Mode.TORCH_COMPILE
with use_kernel_mapping(local, inherit_mapping=False):
    kernelize(model, mode=mode, device="cpu", use_fallback=False)
model.eval()
x = torch.randn(3, 24, requires_grad=True)
wide = x.double()
normed = wide / (wide.square().mean(-1, keepdim=True) + 1e-5).sqrt() * norm.weight.double()
parts = [part.detach().double() for part in (linear.weight, linear.lora_A, linear.lora_B)]
exact = (normed @ parts[0].T) * linear.out_mask + 2 * normed @ parts[1].T @ parts[2].T
expected = torch.autograd.grad(exact.square().sum(), x)[0]
for call in (model, torch.compile(model, backend="aot_eager", fullgraph=True)):
    y = call(x)
    torch.testing.assert_close(y.double(), exact, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(torch.autograd.grad(y.square().sum(), x)[0], expected, rtol=1e-3, atol=1e-3)
model.train()
assert not torch.equal(model(x), model(x)), "dropout"
"""


@pytest.mark.slow
def test_the_library_takes_the_project_its_builds_and_its_layers(hub, tmp_path):
    pytest.importorskip("kernels")  # transformers before 5.25 does not bring it
    command = [sys.executable, "-S", "-c", LIBRARY_TAKES_IT, str(hub)]
    done = run(command, tmp_path, PYTHONPATH=search_path(tmp_path), HF_HUB_OFFLINE="1")
    assert done.returncode == 0, done.stderr
