"""Which tables leave the cache of large sources: the least recently used that nobody uses or makes."""

import os
import signal

import pytest
from filelock import FileLock

from atp.data import arrow, eviction
from atp.ground.errors import InputError


@pytest.fixture
def cache(tmp_path):
    """Tables of 100 bytes each, last used in the order of their names; folders in a cache have such locks."""
    for age, name in enumerate(("a1", "b2", "c3", ".writing-d4")):
        folder = tmp_path / name
        folder.mkdir()
        (folder / arrow.COMPLETE).write_bytes(b"{}")
        (folder / "part-000000.arrow").write_bytes(b"x" * 98)
        os.utime(folder, (1e9 + age, 1e9 + age))
    (tmp_path / "a1.lock").touch()
    return tmp_path


def left(cache):
    return sorted(path.name.removeprefix(".writing-") for path in cache.iterdir() if path.is_dir())


@pytest.mark.parametrize(
    ("most", "stay"), [(400, ["a1", "b2", "c3", "d4"]), (399, ["b2", "c3", "d4"]), (250, ["c3", "d4"]), (0, [])]
)
def test_the_least_recently_used_leave_first(cache, most, stay):
    eviction.trim(cache, most)
    assert left(cache) == stay


def test_a_use_renews_and_keeps(cache):
    use = eviction.Use(cache / "a1")
    eviction.trim(cache, 200)
    assert left(cache) == ["a1", "d4"]
    eviction.trim(cache, 0)
    assert left(cache) == ["a1"]
    del use
    eviction.trim(cache, 0)
    assert left(cache) == []


def test_a_use_in_another_process_keeps_until_it_is_killed(cache):
    ready, begun = os.pipe()
    if (child := os.fork()) == 0:
        use = eviction.Use(cache / "b2")
        os.write(begun, b"x")
        signal.pause()
        os._exit(use is None)
    assert os.read(ready, 1) == b"x"
    try:
        eviction.trim(cache, 0)
        assert left(cache) == ["b2"]
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    eviction.trim(cache, 0)
    assert left(cache) == []


@pytest.mark.parametrize("made", ["c3", "d4"])
def test_what_is_being_made_stays(cache, made):
    with FileLock(cache / f"{made}.lock"):
        eviction.trim(cache, 0)
    assert left(cache) == [made]


def test_what_cannot_be_removed_is_no_table_any_more(cache, monkeypatch):
    """A process that is killed, or fails, in the middle leaves nothing that looks whole."""

    def fail(folder):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("shutil.rmtree", fail)
    eviction.trim(cache, 0)
    assert len(left(cache)) == 4 and not list(cache.rglob(arrow.COMPLETE))


def test_without_locks_nothing_leaves(cache, monkeypatch):
    def none(handle, kind):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr("fcntl.flock", none)
    eviction.Use(cache / "a1")
    eviction.trim(cache, 0)
    assert len(left(cache)) == 4


@pytest.mark.parametrize(("text", "most"), [("", 50e9), (" 2.5 ", 2.5e9), ("0", 0.0), ("inf", float("inf"))])
def test_the_bound_is_a_variable(monkeypatch, text, most):
    monkeypatch.setenv("ATP_DATA_CACHE_GB", text)
    assert eviction.most_bytes() == most


@pytest.mark.parametrize("text", ["much", "-1", "nan", "50GB"])
def test_another_bound_is_refused(monkeypatch, text):
    monkeypatch.setenv("ATP_DATA_CACHE_GB", text)
    with pytest.raises(InputError, match=f"^ATP_DATA_CACHE_GB={text} is no number of gigabytes: set it to"):
        eviction.most_bytes()
