"""Reads YAML and JSON that others wrote: bounded in size and depth, one sentence per mistake."""

from __future__ import annotations

import json
import re
import stat
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import yaml

from atp.ground.errors import InputError, quote, shorten

_LARGEST, _DEEPEST = 100_000, 50  # characters of YAML, and nesting levels: settings need about a page and three levels
_DECODER, _SPACE, _HALF = json.JSONDecoder(), re.compile(r"[ \t\n\r]*"), re.compile(r"\\u[dD]")
_UNSETTLING = ("timestamp", "binary", "omap", "pairs", "set", "value")  # YAML types that no setting has


class _Loader(yaml.SafeLoader):
    """Safe YAML for settings: sections, lists, texts, numbers, true, false and null, without aliases.

    Only true and false are booleans: in `labels: [yes, no]` these are words. A date is text.
    """

    depth = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        """One value. Aliases are refused: a few lines of them can expand beyond memory."""
        start = self.peek_event().start_mark
        if self.check_event(yaml.AliasEvent):
            raise yaml.composer.ComposerError(None, None, "an alias (*name): write the value out", start)
        if self.depth == _DEEPEST:
            raise yaml.composer.ComposerError(None, None, f"nested deeper than {_DEEPEST} levels", start)
        self.depth += 1
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        """The value of a node; one that does not fit its tag, such as `!!int abc`, is an error with its position."""
        try:
            return super().construct_object(node, deep)
        except (ValueError, ArithmeticError, LookupError) as error:
            problem = f"{quote(node.value, 60)} is not of type {shorten(node.tag.rpartition(':')[2], 30)}"
            raise yaml.constructor.ConstructorError(None, None, problem, node.start_mark) from error


_Loader.yaml_constructors = {
    tag: construct
    for tag, construct in yaml.SafeLoader.yaml_constructors.items()
    if tag is None or tag.rpartition(":")[2] not in _UNSETTLING
}
_Loader.yaml_implicit_resolvers = {
    first: [(tag, form) for tag, form in forms if tag.rpartition(":")[2] not in ("bool", *_UNSETTLING)]
    for first, forms in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver("tag:yaml.org,2002:bool", re.compile("^(?:true|True|false|False)$"), list("tTfF"))


def read_yaml(source: str | bytes, where: str) -> Any:
    """The content of a YAML text, in which yes and no are words. Raises `InputError` that mentions `where`."""
    if len(source) > _LARGEST:
        raise InputError(f"{shorten(where)} is longer than {_LARGEST:,} characters: settings need a page")
    try:
        loader = _Loader(source)
        try:
            return loader.get_single_data()
        finally:
            loader.dispose()
    except yaml.MarkedYAMLError as error:
        place = error.problem_mark or error.context_mark
        at = f" (line {place.line + 1}, column {place.column + 1})" if place else ""
        reason = ", ".join(part for part in (error.context, error.problem) if part)
        raise InputError(f"{shorten(where)} is not valid YAML: {shorten(reason)}{at}") from None
    except (yaml.YAMLError, ValueError, OverflowError) as error:  # undecodable bytes, "\UFFFFFFFF"
        raise InputError(f"{shorten(where)} is not valid YAML: {shorten(error)}") from None


def read_yaml_file(path: Path, what: str) -> Any:
    """The content of a YAML file; what: its name in a message. Raises `InputError`."""
    check_file(path, what, "give the path of a YAML file")
    try:
        with path.open("rb") as file:
            content = file.read(_LARGEST + 1)
    except OSError as error:
        raise InputError(f"cannot read {what} {shorten(path)}: {shorten(error.strerror)}") from None
    return read_yaml(content, str(path))


def parse_json(text: str) -> Any:
    """The content of a JSON text. Raises `ValueError` with a short reason, whatever is wrong with it."""
    return _parsed(text, 0, lambda: (json.loads(text), len(text)))[0]


def parse_json_list(text: str) -> Iterator[Any]:
    """The items of a JSON text that begins with `[`, one at a time. Raises `ValueError` as `parse_json` does."""
    at, end = _after_space(text, text.index("[") + 1), ""
    if text[at : at + 1] == "]":
        end = "]"
    while end != "]":
        item, stop = _parsed(text, at, partial(_DECODER.raw_decode, text, at))
        yield item
        at = _after_space(text, stop)
        end = text[at : at + 1]
        if end not in (",", "]"):
            raise ValueError(f"Expecting ',' delimiter at character {at + 1}")
        at = _after_space(text, at + 1) if end == "," else at
    if (rest := _after_space(text, at + 1)) < len(text):
        raise ValueError(f"Extra data at character {rest + 1}")


def _after_space(text: str, start: int) -> int:
    found = _SPACE.match(text, start)
    return found.end() if found else start


def _parsed(text: str, start: int, parse: Callable[[], tuple[Any, int]]) -> tuple[Any, int]:
    """A value that stands in the text from `start`, and where it ends. Raises `ValueError` with a short reason."""
    try:
        content = parse()
        if _HALF.search(text, start, content[1]):
            # Half a surrogate pair cannot be encoded, and no tokenizer takes it.
            json.dumps(content[0], ensure_ascii=False).encode()
    except json.JSONDecodeError as error:
        raise ValueError(f"{error.msg.removesuffix(' at')} at character {error.pos + 1}") from None
    except UnicodeEncodeError:
        raise ValueError("an escape \\ud800 to \\udfff without its other half") from None
    except RecursionError:
        raise ValueError("nested too deeply") from None
    except ValueError:
        raise ValueError("a number with thousands of digits") from None
    return content


def existing(text: str) -> Path | None:
    """The path that a text names, with `~` expanded; None if nothing is there or the text is no path."""
    try:
        path = Path(text).expanduser()
        return path if path.exists() else None
    except (OSError, RuntimeError, ValueError):  # too long, nobody's home, a NUL byte
        return None


def check_file(path: Path, what: str, remedy: str) -> None:
    """Raises `InputError` with the reason if a path is not a regular file. remedy: what the message advises."""
    name = f"{what} {shorten(path)}".strip()
    try:
        mode = path.stat().st_mode
    except (FileNotFoundError, NotADirectoryError):
        raise InputError(f"{name} does not exist: {remedy}") from None
    except OSError as error:
        raise InputError(f"cannot read {name} ({shorten(error.strerror)}): {remedy}") from None
    except ValueError:  # a NUL byte
        raise InputError(f"{name} is not a valid file name: {remedy}") from None
    if stat.S_ISDIR(mode):
        raise InputError(f"{name} is a folder: {remedy}")
    if not stat.S_ISREG(mode):
        raise InputError(f"{name} is not a regular file: {remedy}")
