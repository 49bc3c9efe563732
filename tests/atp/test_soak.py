"""`make soak`, short: it passes on a run as it is, and names what grows."""

import importlib.util
from pathlib import Path
from types import SimpleNamespace

import pytest

spec = importlib.util.spec_from_file_location("soak", Path(__file__).parents[1] / "soak.py")
soak = importlib.util.module_from_spec(spec)
spec.loader.exec_module(soak)


@pytest.mark.slow
def test_a_short_one_stays_as_it_was(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["soak.py", "--steps", "400"])
    assert soak.main() == 0
    assert "all stayed as it was" in capsys.readouterr().out


def watch(memory, files=(6,) * 9, threads=(2,) * 9, children=()):
    process = SimpleNamespace(children=lambda recursive: list(children))
    found = soak.Watch()
    found.memory, found.files, found.threads, found.process = {"tune": memory}, files, threads, process
    return found


@pytest.fixture
def folder(tmp_path):
    for name in ("checkpoint-1", "checkpoint-2"):
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
    (tmp_path / "checkpoints" / "LATEST").touch()
    (tmp_path / "metrics.jsonl").touch()
    return tmp_path


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"memory": [100, 110, 120, 130, 140, 150, 160, 170, 180]}, "memory grew by 21.4% in tune"),
        ({"files": (6, 6, 6, 6, 7, 8, 9, 10, 11)}, "open files went from 6 to 11"),
        ({"threads": (2, 2, 2, 2, 3, 3, 3, 3, 3)}, "threads went from 2 to 3"),
        ({"children": ["one"]}, "1 processes are left"),
        ({"memory": [100, 150, 200, 200, 200, 200, 203, 203, 203]}, None),  # it rises at first
    ],
)
def test_what_grows_is_named(folder, change, named):
    assert soak.problems(watch(**{"memory": [100] * 9} | change), folder, 2) == ([named] if named else [])
