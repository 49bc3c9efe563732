"""Generated pages are whole, every page has a place, quoted sentences exist, and shells can read docs/scale.md."""

import ast
import os
import posixpath
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from torch.distributed.run import get_args_parser
from typer.main import get_command

from atp.cli.cli import app
from atp.config import ATPConfig

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tools"))
import docs_site  # noqa: E402

PAGES = docs_site.generated_pages()
OPERATE = (ROOT / "docs" / "operate.md").read_text(encoding="utf-8")
TROUBLES = re.findall(
    r"^\| `(.*?)` \| .+ \|$", OPERATE.partition("\n## Error messages\n")[2].partition("\n## ")[0], re.MULTILINE
)


def test_every_page_has_one_place():
    text = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    places = re.findall(r"[\w/]+\.md$", text[text.index("nav:") :], re.MULTILINE)
    inside = {path.relative_to(ROOT / "docs").as_posix() for path in (ROOT / "docs").rglob("*.md")}
    assert sorted(places) == sorted({*inside, *docs_site.outside_pages().values(), *PAGES})


def commands(command, name="atp"):
    yield name, command
    for own, inner in getattr(command, "commands", {}).items():
        yield from commands(inner, f"{name} {own}")


def test_commands_with_all_options_and_examples_are_there():
    for name, command in list(commands(get_command(app)))[1:]:
        (section,) = re.findall(rf"^##+ {name}\n(.*?)(?=^##|\Z)", PAGES["commands.md"], re.MULTILINE | re.DOTALL)
        assert all(f"`{option}" in section or f", {option}" in section for p in command.params for option in p.opts
                   if option.startswith("--") and option != "--help")  # fmt: skip
    assert all(yaml.safe_load(path.read_text()) for path in (ROOT / "examples").glob("*.yaml"))
    assert all(path.read_text().strip() in PAGES["recipes.md"] for path in (ROOT / "examples").glob("*.yaml"))


def test_config_keys_are_there_with_meaning_and_default():
    def keys(section, prefix=""):
        for key, field in section.model_fields.items():
            if hasattr(field.annotation, "model_fields"):
                yield from keys(field.annotation, f"{prefix}{key}.")
            else:
                yield f"{prefix}{key}", field

    for key, field in keys(ATPConfig):
        meaning = (field.description or "").replace("|", "\\|")
        assert f"| `{key}` | {meaning} |" in PAGES["config.md"]
    assert "| `lora.alpha` | Numerator of the adapter's scale, alpha / r. | number > 0 | `32.0` |" in PAGES["config.md"]


@pytest.mark.parametrize(
    ("source", "link", "turned"),
    [
        ("docs/data.md", "results.md#a", "results.md#a"),
        ("docs/kernels.md", "../atp_kernels/kept/README.md", "kernels/kept.md"),
        ("docs/plan.md", "../atp_kernels/quantized/README.md", "kernels/quantized.md"),
        ("atp_kernels/kept/README.md", "../../docs/method.md", "../method.md"),
        ("README.md", "docs/data.md", "data.md"),
        ("docs/data.md", "../examples/chat.yaml", "files/examples/chat.yaml"),
        ("docs/compare.md", "../experiments/results/compare.md", "files/experiments/results/compare.md.txt"),
    ],
)
def test_links_through_the_repository_lead_through_the_site(source, link, turned):
    page = docs_site.outside_pages().get(source, posixpath.relpath(source, "docs"))
    text = f"a [b]({link})\n```\n[b]({link})\n```\n"
    assert docs_site.relinked(text, source, page) == f"a [b]({turned})\n```\n[b]({link})\n```\n"


def sentences():
    found = []
    for path in (ROOT / "atp").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                found.append("...".join(part.value for part in node.values if isinstance(part, ast.Constant)))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
    return "\n".join(found)


def test_quoted_sentences_are_those_of_the_program():
    said = sentences()
    assert len(TROUBLES) == len(set(TROUBLES)) >= 16
    for sentence in TROUBLES:
        parts = [part.strip(" :'()") for part in re.split(r"\.\.\.", sentence)]
        missing = [part for part in parts if part and part not in said]
        assert not missing, f"docs/operate.md quotes what no message says: {missing}"


SCALE = (ROOT / "docs" / "scale.md").read_text(encoding="utf-8")
SCRIPTS = re.findall(r"^```sh\n(.*?)^```$", SCALE, re.MULTILINE | re.DOTALL)
JOBS = [yaml.safe_load(text) for text in re.findall(r"^```yaml\n(.*?)^```$", SCALE, re.MULTILINE | re.DOTALL)]


def launches():
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
    assert len(SCRIPTS) == 3 and len(JOBS) == 1 and len(list(launches())) == 4
    spec = JOBS[0]["spec"]["pytorchReplicaSpecs"]["Worker"]["template"]["spec"]
    mounted = {mount["name"] for mount in spec["containers"][0]["volumeMounts"]}
    assert mounted == {volume["name"] for volume in spec["volumes"]}
    policy, worker = JOBS[0]["spec"]["elasticPolicy"], JOBS[0]["spec"]["pytorchReplicaSpecs"]["Worker"]
    assert policy["minReplicas"] == policy["maxReplicas"] == worker["replicas"]


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_shell_reads_the_script(script):
    done = subprocess.run(["bash", "-n"], input=script, text=True, capture_output=True, timeout=60)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("words", list(launches()), ids=lambda words: words[0])
def test_torchrun_and_atp_know_the_options(words):
    if words[0] == "torchrun":
        given = get_args_parser().parse_args(words[1:])
        assert given.module and given.training_script == "atp"
        words = ["atp", *given.training_script_args]
    command = get_command(app).commands[words[1]]
    found = command.make_context(words[1], words[2:]).params
    assert os.path.basename(found["config"]) == "my.yaml"
    ATPConfig.parse({"model": {"path": "x"}, "output_dir": "x"}, found["overrides"])
