"""Same seed, same machine, same bytes: two runs in processes of their own, in other folders, with other hash seeds."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

RUN = "import atp.inputs.promises; atp.inputs.promises.BUDGET_TOLERANCE = 0.02; from atp.cli.cli import main; main()"
SAME = ("model", "base", "adapter", "decisions.json", "decisions.safetensors", "certificate.json")
TIMES = {"tokens_per_second", "phase_seconds", "seconds"}


def trained(config, folder, hash_seed):
    folder.mkdir()
    values = config.model_dump(mode="json") | {"output_dir": "out", "export": {"keep_adapter": True}}
    (folder / "config.yaml").write_text(yaml.safe_dump(values), encoding="utf-8")
    environment = os.environ | {"PYTHONHASHSEED": str(hash_seed), "PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run(
        [sys.executable, "-c", RUN, "train", "config.yaml"], cwd=folder, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return folder / "out"


@pytest.mark.slow
def test_two_processes_write_the_same_bytes(config, tmp_path):
    one, other = (trained(config, tmp_path / name, seed) for name, seed in (("one", 1), ("elsewhere", 2)))
    for name in SAME:
        files = {path.relative_to(one) for path in [one / name, *(one / name).rglob("*")] if path.is_file()}
        there = {path.relative_to(other) for path in [other / name, *(other / name).rglob("*")] if path.is_file()}
        assert files and files == there
        assert [str(file) for file in sorted(files) if (one / file).read_bytes() != (other / file).read_bytes()] == []
    assert {"config.json", "README.md", "model.safetensors"} <= {path.name for path in (one / "model").iterdir()}
    assert (one / "adapter" / "adapter_config.json").is_file()
    losses = [
        [{key: value for key, value in json.loads(line).items() if key not in TIMES} for line in lines.splitlines()]
        for lines in ((folder / "metrics.jsonl").read_text(encoding="utf-8") for folder in (one, other))
    ]
    assert losses[0] == losses[1] and losses[0]
