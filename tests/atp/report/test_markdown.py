"""What cards and pages quote is text, whatever it holds: read back by parsers of Markdown and HTML."""

import pytest
from markdown_it import MarkdownIt
from test_report import parse

from atp.config import ATPConfig
from atp.export.card import adapter_card, base_card, baseline_card, model_card
from atp.report.text import code, plain
from atp.studies.compare.page import write_pages
from atp.studies.compare.table import markdown

HOSTILE = [
    "a`b", "``", "`", "x` <script>alert(1)</script> `y", "<img src=x onerror=alert(1)>", "[text](http://evil)", "a|b",
    "**bold** _it_ ~~no~~ $x$", "&lt;b&gt;", "back\\slash\\", "two\nlines\n\n# heading", "![a](b)", "{{ jinja }}",
    "- x", "1. x", "+", "-0.5 (1.2 to 3)",
]  # fmt: skip


def inline(source):
    blocks = MarkdownIt("gfm-like", {"html": True, "linkify": False}).parse(source)
    return [token for block in blocks for token in [block, *(block.children or [])]]


@pytest.mark.parametrize("text", HOSTILE)
def test_a_quoted_text_comes_back_as_it_was(text):
    said = " ".join(text.split())
    spans = [token.content for token in inline(f"from {code(text)}, then") if token.type == "code_inline"]
    assert spans == [said]
    tokens = inline(f"* {plain(text)}.")
    assert "".join(t.content for t in tokens if t.type in ("text", "text_special")) == f"{said}."
    assert not any("html" in t.type or t.type in ("link_open", "image", "strong_open", "em_open") for t in tokens)


@pytest.mark.parametrize("path", HOSTILE)
def test_a_path_does_not_break_out_of_a_card(path):
    config = ATPConfig.parse({"model": {"path": path}, "output_dir": "x"})
    cards = model_card(config, 10, 5), baseline_card(config, "random", 10, 5), base_card(config), adapter_card(config)
    for card in cards:
        tokens = inline(card.split("---", 2)[2])
        assert " ".join(path.split()) in [token.content for token in tokens if token.type == "code_inline"]
        assert not any("html" in token.type or token.type == "link_open" for token in tokens)
        assert sum(token.type == "heading_open" for token in tokens) == 1


def comparison(text):
    """The content of a comparison.json in which every name and sentence is `text`."""
    figure = {"value": 1.0, "interval": [0.5, 1.5]}
    row = {"keep_decoder": 1.0, "keep_total": 1.0, "params": 1, "megabytes": 1.0, "scores": {text: figure}}
    return {
        "target_keep": 0.5, "methods": {text: row}, "missing": [text], "notes": {text: text}, "command": text,
        "data": {"description": text}, "versions": {text: text},
    }  # fmt: skip


@pytest.mark.parametrize("text", HOSTILE)
def test_a_comparison_holds_no_markup_of_its_inputs(tmp_path, text):
    tokens = inline(markdown(comparison(text)))
    assert not any("html" in t.type or t.type in ("link_open", "image", "em_open", "strong_open") for t in tokens)
    assert [t.content for t in tokens if t.type == "code_inline"] == [" ".join(text.split())]
    assert sum(t.type == "td_open" for t in tokens) == sum(t.type == "th_open" for t in tokens) > 0
    write_pages(tmp_path, comparison(text))
    page, shown = parse(tmp_path / "comparison.html")
    assert not {"script", "img", "b"} & set(page.tags)
    # Its row, its score, the remarks on what is missing and broken, the command, the data and the versions.
    assert shown.count(" ".join(text.split())) >= 8


def test_the_pages_of_a_comparison_hold_no_control_character(tmp_path):
    write_pages(tmp_path, comparison("\x00\x1b[2J\x9b\u202e\u2066z"))
    for name in ("comparison.html", "comparison.md"):
        text = (tmp_path / name).read_text(encoding="utf-8")
        assert r"\x00\x1b[2J\x9b\u202e\u2066z" in text.replace(r"\\", "\\").replace(r"\[", "[")
        assert text.replace("\n", "").replace("\u202f", "").isprintable()
