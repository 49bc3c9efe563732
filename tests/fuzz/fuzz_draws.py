"""Odd values, ways to change good input at random (parts, text and bytes), and the command of a harness."""

import argparse
import contextlib
import json
import logging
import sys
import tempfile
import traceback
import warnings
from collections import Counter
from pathlib import Path

import yaml
from transformers.utils import logging as transformers_logging

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT / folder) for folder in ("", "tests/atp", "tests/atp/report")]  # for whoever imports this
from test_report import places  # noqa: E402

ODD_VALUES = [
    None, True, -1, 0, 0.5, 1e308, float("nan"), float("inf"), 10**30, -(10**400), "", " ", "x" * 5000, "\ud800", "\0",
    "\x1b[31m", "<b>&`|[/red]", "é😀", [], {}, [[]], [None], {"a": {"b": {"c": [1, 2, {}]}}}, {"": ""}, ["x"] * 300,
    "2024-99-99", "~nobody-here/x.jsonl", "../../x", "/", "$\\frac$", {"train": 1}, [0.1, "a", None], "1e999", "0x1F",
]  # fmt: skip
GOOD_VALUES = [1, 2, 16, 0.5, 0.25, True, False, None, "cosine", "kv_group", "a.jsonl", ["a", "b"], {"mlp": 4}]
ODD_KEYS = ["", "lr", "learning_rate", "x" * 3000, "a.b", "\0", "rank", "__class__", "model_config", "é", "0", " "]
ODD_YAML = [
    "&a ", "*a", "&a [*a, *a]", "!!int abc", "!!int ''", "!!float x", "!!bool maybe", "!!timestamp x", "2024-99-99",
    "!!binary '*'", "!!set {a}", "!!python/object/apply:os.getcwd []", "!!omap [a: 1]", "9" * 5000, "[" * 300,
    "{" * 300, "{a: " * 80, "- " * 80, "? ", ": ", "\n", "\t", "  ", "\0", '"\\ud800"', '"\\UFFFFFFFF"', "<<: {a: 1}",
    "<<: 3", "%YAML 9.9\n", "---\n", "...\n", "|", ">", "'", '"', "#", "~", ".inf", ".nan", "1e999", "0b", "0o9",
    "1:60", "=", "\ufeff", "\x85", "\u2028", "!", "!!", "!<", "@", "`", ",", "]", "}", "null", "true", "x" * 5000,
]  # fmt: skip
ODD_JSON = [
    "NaN", "Infinity", "-Infinity", "9" * 5000, "[" * 5000, '{"a":' * 3000, '"\\ud800"', '"\\udc00\\ud800"', "null",
    "\0", "\ufeff", "'", '"', "\\", ",", "}", "]", "\n", "1e999", '"\\u0000"', "[]", "{}", '{"text": 1}', "x" * 200_000,
]  # fmt: skip
ODD_CSV = [
    '"', '""', ",", "\n", "\r", "\r\n", ";", "\t", "\0", "x" * 200_000, "\ufeff", '"\n', ",,,,", "'", "é", "\x1a",
]  # fmt: skip


def rebuilt(draw, value, times):
    """The value with some of its parts replaced, removed, renamed or moved."""
    for _ in range(times):
        value = _changed(draw, value, draw.choice(list(places(value))))
    return value


def _changed(draw, value, path):
    if not path:
        return value if draw.random() < 0.9 else draw.choice(ODD_VALUES)
    copy = value.copy()
    key, *rest = path
    if rest:
        copy[key] = _changed(draw, value[key], rest)
    elif (what := draw.random()) < 0.6:
        copy[key] = draw.choice(ODD_VALUES)
    elif what < 0.7:
        del copy[key]
    elif isinstance(copy, dict):
        copy[draw.choice(ODD_KEYS)] = copy[key] if what < 0.85 else draw.choice(ODD_VALUES)
    else:
        copy.insert(key, draw.choice(ODD_VALUES))
    return copy


def scrambled(draw, text, odd, times):
    """The text with pieces cut out, doubled, moved, and odd ones put in."""
    for _ in range(times):
        start = draw.randrange(len(text) + 1)
        end = min(len(text), start + draw.choice((1, 1, 2, 5, 20, 100)))
        piece = text[start:end]
        what = draw.random()
        if what < 0.5:
            text = text[:start] + draw.choice(odd) + text[start if what < 0.3 else end :]
        elif what < 0.7:
            text = text[:start] + text[end:]
        elif what < 0.8:
            text = text[:end] + piece + text[end:]
        elif what < 0.9:
            text = text[:start] + text[end:] + piece
        else:
            text = text[:start] + chr(draw.choice((0, 9, 10, 13, 27, 127, 0xA0, 0x2028, 0x1F600))) + text[end:]
    return text


def garbled(draw, content, times):
    """The bytes with some of them changed, cut off or doubled."""
    content = bytearray(content)
    for _ in range(times):
        place = draw.randrange(len(content) + 1)
        what = draw.random()
        if what < 0.75 and place < len(content):
            content[place] = draw.randrange(256)
        elif what < 0.85:
            del content[place : place + draw.choice((1, 4, 64))]
        elif what < 0.93:
            content[place:place] = bytes(draw.randrange(256) for _ in range(draw.choice((1, 4, 16))))
        else:
            del content[place:]
    return bytes(content)


def as_yaml(draw, values, times):
    """Bytes of a YAML text of the values, odd in its values, its text or its bytes."""
    values = rebuilt(draw, values, draw.randrange(times))
    text = yaml.safe_dump(values, sort_keys=False, default_flow_style=draw.random() < 0.2, allow_unicode=True)
    if draw.random() < 0.35:
        text = scrambled(draw, text, ODD_YAML, draw.randrange(1, 4))
    content = text.encode("utf-8", "surrogatepass")
    return garbled(draw, content, draw.randrange(1, 4)) if draw.random() < 0.15 else content


def as_json(draw, values, times):
    text = json.dumps(rebuilt(draw, values, draw.randrange(times)), ensure_ascii=draw.random() < 0.7)
    if draw.random() < 0.4:
        text = scrambled(draw, text, ODD_JSON, draw.randrange(1, 3))
    content = text.encode("utf-8", "surrogatepass")
    return garbled(draw, content, draw.randrange(1, 3)) if draw.random() < 0.15 else content


def quiet():
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()


def play(doc, run_case, around=contextlib.nullcontext):
    """Runs the cases that the command line asks for, each inside `around()`, and prints what became of them."""
    parser = argparse.ArgumentParser(description=doc.splitlines()[0])
    parser.add_argument("--cases", type=int, default=40)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--case", type=int, help="this one alone")
    options = parser.parse_args()
    quiet()
    counts = Counter()
    for number in range(options.cases) if options.case is None else [options.case]:
        try:
            with tempfile.TemporaryDirectory() as folder, around():
                counts[run_case(options.seed, number, Path(folder))] += 1
        except Exception as error:
            counts["FAILED"] += 1
            told = "".join(traceback.format_exception(error, limit=None if options.case is not None else -4))
            print(f"--seed {options.seed} --case {number}: {told}", flush=True)
    print(f"seed {options.seed}: {counts.total()} cases")
    for outcome, count in sorted(counts.items()):
        print(f"{count:6} {outcome}")
    sys.exit(counts["FAILED"] > 0)
