"""Files and folders appear whole or not at all, and nothing is written through a link."""

import os
from pathlib import Path

import pytest
from tiny_command import another_process

from atp.ground.ending import ending
from atp.ground.errors import InputError
from atp.ground.files import append, remove_leftovers, remove_leftovers_of, whole_file, whole_folder, write_text

PRECIOUS = "precious"


@pytest.fixture
def folder(tmp_path):
    """An empty folder, beside which `canary` and the folder `canaries` lie."""
    (tmp_path / "canary").write_text(PRECIOUS)
    (tmp_path / "canaries").mkdir()
    (tmp_path / "canaries" / "a.txt").write_text(PRECIOUS)
    (tmp_path / "folder").mkdir()
    yield tmp_path / "folder"
    assert (tmp_path / "canary").read_text() == (tmp_path / "canaries" / "a.txt").read_text() == PRECIOUS
    assert sorted(os.listdir(tmp_path)) == ["canaries", "canary", "folder"]


def put(writer, path, text):
    with writer(path) as temporary:
        (temporary / "a.txt" if writer is whole_folder else temporary).write_text(text)


def text_of(path):
    return (path / "a.txt" if path.is_dir() else path).read_text()


@pytest.mark.parametrize("writer", [whole_file, whole_folder])
@pytest.mark.parametrize("target", ["canary", "canaries", "nowhere"])
def test_links_are_replaced_and_never_followed(folder, writer, target):
    for name in ("result", ".writing-result", ".writing-old-result"):
        (folder / name).symlink_to(f"../{target}")
    put(writer, folder / "result", "new")
    assert not (folder / "result").is_symlink() and text_of(folder / "result") == "new"


@pytest.mark.parametrize("writer", [whole_file, whole_folder])
def test_of_two_writers_the_last_one_wins_whole(folder, writer):
    path = folder / "result"
    with writer(path) as first, writer(path) as second:
        for temporary, text in ((first, "first"), (second, "second")):
            (temporary / text if writer is whole_folder else temporary).write_text(text)
    assert os.listdir(path) == ["first"] if writer is whole_folder else path.read_text() == "first"
    assert os.listdir(folder) == ["result"]


def test_a_folder_that_appears_in_the_last_moment_is_replaced(folder, monkeypatch):
    path, replace, met = folder / "result", os.replace, []

    def just_before(source, target):
        if target == path and not met:
            met.append(target)
            put(whole_folder, path, "other")
        replace(source, target)

    monkeypatch.setattr(os, "replace", just_before)
    put(whole_folder, path, "mine")
    assert met and text_of(path) == "mine" and os.listdir(folder) == ["result"]


def test_what_cannot_be_replaced_stays(folder, monkeypatch):
    path, replace = folder / "result", os.replace
    put(whole_folder, path, "old")

    def fail(source, target):
        if target == path and text_of(source) == "new":
            raise PermissionError("no")
        replace(source, target)

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(PermissionError):
        put(whole_folder, path, "new")
    assert text_of(path) == "old" and os.listdir(folder) == ["result"]


@pytest.mark.parametrize("writer", [whole_file, whole_folder])
@pytest.mark.parametrize("name", ["x" * 251 + ".png", "ä" * 125 + ".json"])
def test_the_longest_names_are_written(folder, writer, name):
    with writer(folder / name) as temporary:
        assert temporary.suffix == Path(name).suffix  # by which some libraries choose a format
    assert os.listdir(folder) == [name]


@pytest.mark.parametrize("remove", [remove_leftovers, lambda folder: remove_leftovers_of(folder / "result")])
@pytest.mark.parametrize("writer", [whole_file, whole_folder])
def test_only_what_nobody_writes_any_more_is_a_leftover(folder, writer, remove):
    with another_process(writer(folder / "result")):
        before = os.listdir(folder)
        assert len(before) == 1
        remove(folder)
        assert os.listdir(folder) == before
    remove(folder)
    assert os.listdir(folder) == []


def test_leftovers_of_other_names_and_what_links_lead_to_stay(folder):
    for name in (".writing-1-other", ".writing-1-result"):
        (folder / name).write_text("half")
    (folder / ".writing-2-result").symlink_to("../canaries")
    os.mkfifo(folder / ".writing-3-result")
    remove_leftovers_of(folder / "result")
    assert os.listdir(folder) == [".writing-1-other"]


def test_only_regular_files_grow(folder):
    path = folder / "metrics.jsonl"
    append(path, "a\n")
    append(path, "ä\n")
    assert path.read_text(encoding="utf-8") == "a\nä\n"
    for make in (lambda: path.symlink_to("../canary"), lambda: path.symlink_to("../nowhere"),
                 lambda: os.mkfifo(path), lambda: path.mkdir()):  # fmt: skip
        path.unlink()
        make()
        with pytest.raises(InputError, match=r"metrics.jsonl is a link or no file, so nothing is written"):
            append(path, "b\n")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
@pytest.mark.parametrize("writer", [whole_file, whole_folder])
def test_a_full_disk_names_what_was_written(folder, writer):
    with pytest.raises(OSError) as caught:
        with writer(folder / "result"), open("/dev/full", "w") as full:
            full.write("x")
    said = ending(caught.value)[0]
    assert said.startswith("the disk is full") and f"'{folder / 'result'}'" in said and "free some space" in said
    assert os.listdir(folder) == []


def test_text_replaces_text(folder):
    for text in ("old", "new ä"):
        write_text(folder / "a.txt", text)
    assert (folder / "a.txt").read_text(encoding="utf-8") == "new ä" and os.listdir(folder) == ["a.txt"]
