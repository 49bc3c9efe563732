"""What the documentation site holds beside docs/: a hook of mkdocs (`make docs`).

Commands, config keys and recipes are pages made from the package; pages elsewhere in the repository join those of
docs/; and links between them, which lead through the repository, are turned to where the pages are on the site.
"""

from __future__ import annotations

import ast
import inspect
import itertools
import posixpath
import re
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

if TYPE_CHECKING:
    from mkdocs.config.defaults import MkDocsConfig
    from mkdocs.structure.files import Files
    from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

_LINK = re.compile(r"\]\((?!https?:|mailto:|#)([^)#\s]+)(#[^)\s]*)?\)")
_FENCE = re.compile(r"(^```.*?^```[^\S\n]*$)", re.MULTILINE | re.DOTALL)


@cache
def outside_pages() -> dict[str, str]:
    """Path in the repository -> page of the site, for the pages that are not in docs/."""
    rooms = sorted((ROOT / "atp_kernels").glob("*/README.md"))
    return {
        "README.md": "index.md",
        "CHANGELOG.md": "project/changelog.md",
        "CONTRIBUTING.md": "project/contributing.md",
        "SECURITY.md": "project/security.md",
        "benchmarks/README.md": "project/benchmarks.md",
        **{f"atp_kernels/{path.parent.name}/README.md": f"kernels/{path.parent.name}.md" for path in rooms},
    }


def generated_pages() -> dict[str, str]:
    """Page of the site -> its Markdown, for the pages that are made from the package."""
    return {
        "commands.md": "\n".join(_commands()),
        "config.md": "\n".join(_config()),
        "recipes.md": "\n".join(_recipes()),
        "files.md": "\n".join(_files()),
        "api.md": _api("atp", "Python", ["ATPConfig", "Run", "ATPTrainer", "integrations.ATPCallback"]),
        "kernels/api.md": _api("atp_kernels", "Kernels from Python", _operations()),
    }


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds the pages that are not in docs/, and the files of the repository that pages link to."""
    from mkdocs.structure.files import File

    for name, page in outside_pages().items():
        files.append(File.generated(config, page, content=(ROOT / name).read_text(encoding="utf-8")))
    for page, text in generated_pages().items():
        files.append(File.generated(config, page, content=text))
    for name in sorted(_linked_files()):
        files.append(File.generated(config, _asset(name), abs_src_path=str(ROOT / name)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Turns links through the repository to the site."""
    return relinked(markdown, _sources().get(page.file.src_uri, page.file.src_uri), page.file.src_uri)


def relinked(text: str, source: str, page: str) -> str:
    """The text of a page with its links turned. source: its path in the repository. page: its path on the site."""

    def turn(link: re.Match[str]) -> str:
        target = _target(source, link[1])
        if target is None:
            return link[0]
        return f"]({posixpath.relpath(target, posixpath.dirname(page) or '.')}{link[2] or ''})"

    parts = _FENCE.split(text)  # code between the texts
    return "".join(part if index % 2 else _LINK.sub(turn, part) for index, part in enumerate(parts))


def _sources() -> dict[str, str]:
    """Page of the site -> its path in the repository."""
    inside = {path.relative_to(ROOT / "docs").as_posix(): path for path in (ROOT / "docs").rglob("*.md")}
    pages = {page: path.relative_to(ROOT).as_posix() for page, path in inside.items()}
    return pages | {page: name for name, page in outside_pages().items()}


def _target(source: str, link: str) -> str | None:
    """Where a link of a page leads on the site; None for what the repository does not have."""
    name = posixpath.normpath(posixpath.join(posixpath.dirname(source), link))
    page = {name: page for page, name in _sources().items()}.get(name)
    return page or (_asset(name) if (ROOT / name).is_file() else None)


def _asset(name: str) -> str:
    # No page is made of what is shown as it is.
    return f"files/{name}" + (".txt" if name.endswith(".md") else "")


def _linked_files() -> set[str]:
    """Files of the repository that pages link to and that are no pages."""
    sources = _sources()
    found = set()
    for source in sources.values():
        for link in _LINK.finditer((ROOT / source).read_text(encoding="utf-8")):
            name = posixpath.normpath(posixpath.join(posixpath.dirname(source), link[1]))
            if name not in sources.values() and (ROOT / name).is_file():
                found.add(name)
    return found


def _commands() -> Iterator[str]:
    import typer

    from atp.cli.cli import app

    yield from ("# Commands", "", "What `atp COMMAND --help` says. Exit codes are in [Operate a run](operate.md).", "")
    yield from _command(typer.main.get_command(app), "atp", 2)


def _command(command: Any, name: str, level: int) -> Iterator[str]:
    text, _, example = inspect.cleandoc(command.help or "").partition("Example: ")
    inner = getattr(command, "commands", {})
    if name != "atp":
        yield from (f"{'#' * level} {name}", "", text.strip().replace("\n", " "), "")
        if example:
            yield from ("```", example.strip(), "```", "")
    options = [parameter for parameter in command.params if parameter.name != "help"]
    if options and name != "atp":
        yield from ("| | meaning | default |", "|---|---|---|")
        for option in options:
            yield _row(f"`{_spelled(option)}`", getattr(option, "help", "") or "", _default(option.default))
        yield ""
    for own, one in inner.items():
        yield from _command(one, f"{name} {own}", level if name == "atp" else level + 1)


def _spelled(option: Any) -> str:
    """An option or argument as it is typed."""
    if option.param_type_name == "argument":
        shown = option.metavar or option.name.upper()
        return f"{shown} ..." if option.nargs == -1 else shown
    spelled = ", ".join(option.opts)
    return spelled if option.is_flag else f"{spelled} {option.metavar or option.name.upper()}"


def _config() -> Iterator[str]:
    from atp.config import ATPConfig

    schema = ATPConfig.model_json_schema()
    yield from (
        "# Config",
        "",
        "All keys, from the schema (`atp config schema`). Give them in YAML, or as `section.key=value`",
    )
    yield from ("on the command line. `null` leaves a choice to the program.", "")
    own = {name: field for name, field in schema["properties"].items() if "$ref" not in field}
    yield from _keys("At the top", "", schema["description"], own)
    for name, field in schema["properties"].items():
        if "$ref" in field:
            section = schema["$defs"][field["$ref"].rpartition("/")[2]]
            yield from _keys(f"`{name}`", f"{name}.", section["description"], section["properties"])
    from atp.config.presets import PRESETS

    yield from ("## Presets", "", "`quick` is the defaults. The others set:", "")
    for name, settings in PRESETS.items():
        yield from (f"### `{name}`", "", "```yaml", yaml.safe_dump(settings, sort_keys=False).strip(), "```", "")


def _keys(title: str, prefix: str, meaning: str, properties: dict[str, Any]) -> Iterator[str]:
    yield from (f"## {title}", "", meaning, "", "| key | meaning | values | default |", "|---|---|---|---|")
    for name, field in properties.items():
        default = f"`{yaml_value(field['default'])}`" if "default" in field else "needed"
        yield _row(f"`{prefix}{name}`", field.get("description", ""), _values(field), default)
    yield ""


def _values(field: dict[str, Any]) -> str:
    """Type and range of a key, in words."""
    if "anyOf" in field:
        return " or ".join(dict.fromkeys(_values(one) for one in field["anyOf"]))
    if "enum" in field:
        return ", ".join(f"`{value}`" for value in field["enum"])
    if "const" in field:
        return f"`{field['const']}`"
    bounds = {"minimum": ">=", "exclusiveMinimum": ">", "maximum": "<=", "exclusiveMaximum": "<"}
    limits = [f"{sign} {field[name]:g}" for name, sign in bounds.items() if name in field]
    kind = {"object": "mapping", "array": "list", "string": "text"}.get(field.get("type", ""), field.get("type", "any"))
    return " ".join([kind, ", ".join(limits)]).strip()


def yaml_value(value: Any) -> str:
    """A value as YAML on one line."""
    return yaml.safe_dump(value, default_flow_style=True, width=10**9).removesuffix("...\n").strip()


def _recipes() -> Iterator[str]:
    yield from (
        "# Recipes",
        "",
        "Configs that come with the package: `atp train examples/NAME.yaml` works in any folder, with",
    )
    yield from ("`key.path=value` for what differs. `atp init` writes one for your model and data.", "")
    for path in sorted((ROOT / "examples").glob("*.yaml")):
        yield from (f"## {path.name}", "", "```yaml", path.read_text(encoding="utf-8").strip(), "```", "")


def _files() -> Iterator[str]:
    """Every source file with the first paragraph of its docstring or comment, folder by folder."""
    yield from (
        "# Files",
        "",
        "What each source file is for, in its own words. [Architecture](architecture.md) has the rooms.",
    )
    for package in ("atp", "atp_kernels", "csrc"):
        paths = [path for path in (ROOT / package).rglob("*") if path.suffix in {".py", ".cpp", ".cu", ".h"}]
        for folder in sorted({path.parent for path in paths}):
            yield from ("", f"## {folder.relative_to(ROOT).as_posix()}", "", "| file | what it is for |", "|---|---|")
            for path in sorted(path for path in paths if path.parent == folder):
                yield _row(f"`{path.name}`", purpose(path))


def purpose(path: Path) -> str:
    """The first paragraph of a source file's docstring, or of the comment that it begins with."""
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".py":
        return (ast.get_docstring(ast.parse(text)) or "").partition("\n\n")[0]
    lines = itertools.takewhile(lambda line: line.startswith("// "), text.splitlines())
    return " ".join(line.removeprefix("// ") for line in lines)


def _operations() -> list[str]:
    tree = ast.parse((ROOT / "atp_kernels" / "__init__.py").read_text(encoding="utf-8"))
    (names,) = (
        node.value for node in tree.body if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__"
    )
    return [name for name in ast.literal_eval(names) if not name.startswith("__")]


def _api(package: str, title: str, names: list[str]) -> str:
    return "\n".join([f"# {title}", "", *(f"::: {package}.{name}\n" for name in names)])


def _default(value: Any) -> str:
    if value is None or value is False or value is ... or callable(value) or str(value) in ("", "()", "[]"):
        return ""
    return f"`{value}`"


def _row(*cells: str) -> str:
    return "| " + " | ".join(" ".join(cell.split()).replace("|", "\\|") for cell in cells) + " |"
