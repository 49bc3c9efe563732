"""Code that runs foreign code, unpickles or opens a shell is found; what pip-audit says becomes a line a weakness."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tools"))
import audit  # noqa: E402
import forbidden  # noqa: E402

BAD = [
    "AutoModel.from_pretrained(path, trust_remote_code=True)",
    "AutoModel.from_pretrained(path, trust_remote_code=trusted)",
    "AutoModel.from_pretrained(path, use_safetensors=False)",
    "AutoModel.from_pretrained(path, use_safetensors=None)",
    "model.save_pretrained(path, safe_serialization=False)",
    "torch.load(path)",
    "torch.load(path, weights_only=False)",
    "torch.save(model, path)",
    "import pickle",
    "from pickle import loads",
    "import numpy, marshal",
    "def later():\n    import shelve",
    "numpy.load(path, allow_pickle=True)",
    "yaml.load(text)",
    "yaml.load(text, Loader=yaml.Loader)",
    "yaml.load(text, yaml.UnsafeLoader)",
    "class Loader(yaml.FullLoader): pass\nyaml.load(text, Loader)",
    "yaml.unsafe_load(text)",
    "subprocess.run(text, shell=True)",
    "os.system(text)",
    "eval(text)",
    "exec(text)",
]
GOOD = [
    "AutoModel.from_pretrained(path, trust_remote_code=False, use_safetensors=True)",
    "torch.load(path, weights_only=True)",
    "yaml.safe_load(text)",
    "yaml.load(text, Loader=yaml.SafeLoader)",
    "class Loader(yaml.SafeLoader): pass\nyaml.load(text, Loader=Loader)",
    "subprocess.run([name], shell=False)",
    "model.eval()",
    "text = 'eval(x); import pickle'  # torch.load(path)",
]


@pytest.mark.parametrize("source", BAD)
def test_each_is_found(source):
    ((line, what),) = forbidden.findings("x = 1\n" + source)
    assert line == 1 + len(source.splitlines()) and what


@pytest.mark.parametrize("source", GOOD)
def test_what_is_safe_is_not(source):
    assert list(forbidden.findings(source)) == []


def test_there_is_none_here_and_a_finding_fails_the_command(tmp_path):
    done = subprocess.run([sys.executable, ROOT / "tools" / "forbidden.py"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    assert int(done.stdout.split()[0]) > 200
    file = tmp_path / "bad.py"
    file.write_text("import os\nos.system('ls')\n", encoding="utf-8")
    done = subprocess.run([sys.executable, ROOT / "tools" / "forbidden.py", file], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (1, f"{file}:2: os.system() hands a text to a shell\n")


WEAK = {"name": "old", "version": "1.0", "vulns": [{"id": "CVE-1", "fix_versions": ["1.1", "2.0"]}]}
SOUND = {"name": "new", "version": "2.0", "vulns": []}
SKIPPED = {"name": "atp-kernels", "skip_reason": "editable"}


def test_a_weakness_is_named_and_fails_and_none_passes():
    lines, status = audit.verdict(json.dumps({"dependencies": [SOUND, WEAK, SKIPPED], "fixes": []}), "")
    assert lines == ["old 1.0: CVE-1, fixed in 1.1, 2.0", "1 known weaknesses in 3 packages"] and status == 1
    assert audit.verdict(json.dumps({"dependencies": [SOUND]}), "") == (["0 known weaknesses in 1 packages"], 0)


@pytest.mark.parametrize("errors", ["", "Traceback\nConnectionError: no network", "No module named pip_audit"])
def test_no_answer_is_one_line(errors):
    ((line,), status) = audit.verdict("", errors)
    assert line.startswith("audit skipped: ") and line.endswith((errors.splitlines() or ["no answer"])[-1])
    assert status == 0
