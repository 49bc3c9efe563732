"""The recipes of docs/scale.md: shells and YAML can read them, torchrun and atp know their options."""

import os
import re
import shlex
import subprocess
from pathlib import Path

import pytest
import yaml
from torch.distributed.run import get_args_parser
from typer.main import get_command

from atp.cli.cli import app
from atp.config import ATPConfig

PAGE = (Path(__file__).parents[1] / "docs" / "scale.md").read_text(encoding="utf-8")
SCRIPTS = re.findall(r"^```sh\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
JOBS = [yaml.safe_load(text) for text in re.findall(r"^```yaml\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)]


def commands():
    """The words of every command line that starts torchrun or atp, after what a shell would do to them."""
    for script in SCRIPTS:
        for line in script.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            words = words[1:] if words[:1] == ["srun"] else words
            if words[:1] in (["torchrun"], ["atp"]):
                yield [re.sub(r"\$\w+", "4", word) for word in words]
    for job in JOBS:
        (container,) = job["spec"]["pytorchReplicaSpecs"]["Worker"]["template"]["spec"]["containers"]
        yield container["command"]


def test_there_are_recipes_and_the_volumes_of_the_job():
    assert len(SCRIPTS) == 3 and len(JOBS) == 1 and len(list(commands())) == 4
    spec = JOBS[0]["spec"]["pytorchReplicaSpecs"]["Worker"]["template"]["spec"]
    mounted = {mount["name"] for mount in spec["containers"][0]["volumeMounts"]}
    assert mounted == {volume["name"] for volume in spec["volumes"]}
    policy, worker = JOBS[0]["spec"]["elasticPolicy"], JOBS[0]["spec"]["pytorchReplicaSpecs"]["Worker"]
    assert policy["minReplicas"] == policy["maxReplicas"] == worker["replicas"]


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_shell_reads_the_script(script):
    done = subprocess.run(["bash", "-n"], input=script, text=True, capture_output=True, timeout=60)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("words", list(commands()), ids=lambda words: words[0])
def test_torchrun_and_atp_know_the_options(words):
    if words[0] == "torchrun":
        given = get_args_parser().parse_args(words[1:])
        assert given.module and given.training_script == "atp"
        words = ["atp", *given.training_script_args]
    command = get_command(app).commands[words[1]]
    found = command.make_context(words[1], words[2:]).params
    assert os.path.basename(found["config"]) == "my.yaml"
    ATPConfig.parse({"model": {"path": "x"}, "output_dir": "x"}, found["overrides"])
