"""YAML and JSON of others: bounded, and every mistake one sentence with its place."""

import json
import os

import pytest
import yaml

from atp.ground.errors import InputError
from atp.ground.reading import check_file, existing, parse_json, read_yaml, read_yaml_file

BOMB = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{new}: &{new} [{', '.join([f'*{old}'] * 9)}]\n" for old, new in zip("abcdefgh", "bcdefghi", strict=True)
)


def refused(text):
    with pytest.raises(InputError) as caught:
        read_yaml(text, "the text")
    message = str(caught.value)
    assert "\n" not in message and len(message) < 600 and message.startswith("the text is ")
    return message


@pytest.mark.timeout(10)
def test_an_alias_bomb_is_refused_at_its_first_alias():
    assert len(BOMB) < 400
    assert "an alias (*name): write the value out (line 2, column 8)" in refused(BOMB)
    assert "alias" in refused("&a [*a]")


@pytest.mark.timeout(10)
@pytest.mark.parametrize("text", ["[" * 90_000, "{a: " * 20_000, "- " * 40_000, "? " * 40_000, "[" * 60 + "]" * 60])
def test_deep_nesting_is_refused(text):
    assert "nested deeper than 50 levels" in refused(text) or "not valid YAML" in refused(text)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("seed: !!int abc", "'abc' is not of type int (line 1, column 7)"),
        ("seed: !!int ''", "'' is not of type int"),
        ("seed: !!float x", "'x' is not of type float"),
        ("seed: !!bool maybe", "'maybe' is not of type bool"),
        ("seed: " + "9" * 5000, "is not of type int"),
        ("a: !!timestamp x", "constructor for the tag 'tag:yaml.org,2002:timestamp'"),
        ("a: !!binary '*'", "constructor for the tag"),
        ("a: !!python/object/apply:os.getcwd []", "constructor for the tag"),
        ("a: !" + "x" * 5000 + " 1", "constructor for the tag"),
        ('a: "\\UFFFFFFFF"', "not valid YAML"),
        ("? [a]\n: 1", "unhashable key"),
        ("a: 1\n---\nb: 2", "single document"),
        (b"a: caf\xe9", "unacceptable character #x00e9"),
        ("a: \0", "special characters are not allowed"),
        ("x" * 200_000, "longer than 100,000 characters"),
    ],
)
def test_odd_values_give_a_sentence(text, reason):
    assert reason in refused(text)


def test_dates_and_odd_words_are_texts_and_what_the_program_writes_reads_back():
    text = "{day: 2024-01-02, none: 2024-99-99, words: [yes, no, on, =, 12-5], true: 1}"
    expected = {"day": "2024-01-02", "none": "2024-99-99", "words": ["yes", "no", "on", "=", "12-5"], True: 1}
    assert read_yaml(text, "x") == expected
    values = {"date": "2024-01-02", "yes": "no", "number": "0x10", "n": [1, 2.5, 1e-05, True, None, "null", "=", "*a"]}
    assert read_yaml(yaml.safe_dump(values), "x") == values


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ('{"a": ', "Expecting value at character 7"),
        ("[" * 200_000, "nested too deeply"),
        ('{"a": ' * 50_000, "nested too deeply"),
        ("1" * 5000, "a number with thousands of digits"),
        ('"\\ud800"', "without its other half"),
        ('{"\\uDC00": 1}', "without its other half"),
    ],
)
def test_damaged_json_gives_a_reason(text, reason):
    with pytest.raises(ValueError, match=reason) as caught:
        parse_json(text)
    assert len(str(caught.value)) < 100


def test_a_whole_surrogate_pair_is_a_character():
    assert parse_json(json.dumps({"a": "😀"})) == {"a": "😀"}


def test_what_no_path_can_be_is_nowhere(tmp_path):
    assert existing(str(tmp_path)) == tmp_path and existing("~").is_dir()
    for text in ("~nobody-of-this-name/a", "x" * 5000, "a\0b", str(tmp_path / "absent")):
        assert existing(text) is None


def test_paths_that_are_no_files(tmp_path):
    (tmp_path / "dir.yaml").mkdir()
    os.mkfifo(tmp_path / "pipe.yaml")
    for name, reason in {
        "absent.yaml": "does not exist: give",
        "dir.yaml": "is a folder: give",
        "pipe.yaml": "is not a regular file: give",
        "x" * 5000: r"cannot read a config .*\.\.\. \(File name too long\): give",
        "a\0b": "is not a valid file name: give",
        "dir.yaml/x": "does not exist: give",
    }.items():
        with pytest.raises(InputError, match=reason):
            read_yaml_file(tmp_path / name, "a config")
    (tmp_path / "a.yaml").write_text("a: 1", encoding="utf-8")
    check_file(tmp_path / "a.yaml", "a config", "")
    assert read_yaml_file(tmp_path / "a.yaml", "a config") == {"a": 1}
    (tmp_path / "large.yaml").write_text("#" * 10**6, encoding="utf-8")
    with pytest.raises(InputError, match="longer than 100,000 characters"):
        read_yaml_file(tmp_path / "large.yaml", "a config")
