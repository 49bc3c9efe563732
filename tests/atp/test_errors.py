"""What messages quote is short, on one line and safe to build, whatever it is."""

import sys
from functools import reduce
from pathlib import Path

import pytest

from atp.ground.errors import InputError, quote, shorten, visible


class Rude:
    def __repr__(self):
        raise RuntimeError("no")


LOOP = {"name": "x"}
LOOP["self"] = [LOOP]
NESTED = reduce(lambda inner, _: [inner], range(10**5), [])
BOMB = reduce(lambda inner, _: [inner] * 9, range(12), ["lol"] * 9)  # 9 ** 13 items to print
AWKWARD = [
    "x" * 10**6, "line\nline", "\x1b[31mred\x07", "\ud800", "\0", 10**6000, -(10**6000), {10**5000: 1}, NESTED,
    LOOP, BOMB, Rude(), {"k" * 10**6: "v" * 10**6}, list(range(10**6)), b"y" * 10**6, {1, "a"}, float("nan"),
    ValueError("z" * 10**6), None, "",
]  # fmt: skip


@pytest.mark.timeout(20)
@pytest.mark.parametrize("value", AWKWARD, ids=lambda value: type(value).__name__)
@pytest.mark.parametrize("said", [shorten, quote])
def test_whatever_is_quoted_is_short_and_printable(said, value):
    text = said(value)
    assert len(text) <= 200 and (text.isprintable() and text.encode() or text == "")
    assert len(said(value, 20)) <= 20


def test_a_text_is_said_as_it_is_a_value_as_code_a_long_number_by_its_length_and_messages_are_bounded():
    assert shorten("a  b\n c") == "a b c" and shorten("x" * 300) == "x" * 197 + "..."
    assert quote("it's") == '"it\'s"' and quote("a\nb") == r"'a\nb'" and quote("x" * 300) == "'" + "x" * 196 + "..."
    assert quote([1, {"a": (True, None)}]) == "[1, {'a': (True, None)}]" and quote(1.5) == "1.5"
    assert shorten(ValueError("what\nhappened")) == "what happened" and shorten(Path("a/b")) == "a/b"
    assert shorten([1]) == "[1]"
    assert sys.get_int_max_str_digits() < 6000
    assert quote(10**6000) == "a number of about 6001 digits"
    error = InputError("a " * 10**6 + "\x1b")
    assert len(str(error)) <= 1000 and str(error).isprintable()
    assert str(InputError("short, where, remedy")) == "short, where, remedy"


def test_foreign_text_keeps_its_lines_and_letters_and_loses_what_a_terminal_obeys():
    harmless = "a\tb\n\u00fc \u0645\u06cc\u200c\u062e\u0648\u0627\u0647\u0645 \U0001f469\u200d\U0001f52c \\x1b"
    assert visible(harmless) == harmless, "joiners are letters' own"
    assert visible("\x1b]0;x\x07\r\0\x9b2J\x7f") == r"\x1b]0;x\x07\r\x00\x9b2J\x7f"
    assert visible("\u202eab\u2069\ud800") == r"\u202eab\u2069\ud800"
