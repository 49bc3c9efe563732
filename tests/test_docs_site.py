"""The site's pages that are made from the package are whole, every page has a place, and quoted sentences exist."""

import ast
import posixpath
import re
import sys
from pathlib import Path

import pytest
import typer
import yaml

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
    for name, command in list(commands(typer.main.get_command(app)))[1:]:
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
