"""On a terminal something moves in every phase of a run; no phase is left out."""

import io
import threading
import time

import pytest
from rich.console import Console
from tiny_command import start

from atp.ground import progress
from atp.training.callbacks import make_progress


class Screen(io.StringIO):
    def __init__(self):
        super().__init__()
        self.times = [time.monotonic()]

    def write(self, text):
        self.times.append(time.monotonic())
        return super().write(text)


@pytest.fixture
def screen(monkeypatch):
    """A terminal of 100 columns: (console, screen)."""
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    monkeypatch.setenv("TERM", "xterm")
    file = Screen()
    return Console(file=file, force_terminal=True, width=100), file


def frames(file, seconds):
    file.seek(0)
    file.truncate()
    time.sleep(seconds)
    return file.getvalue().split("\r")


def test_a_phase_without_bars_moves(screen):
    console, file = screen
    with progress.logged(as_json=False, console=console):
        progress.begin("certificate")
        drawn = frames(file, 1.0)
        assert len({frame for frame in drawn if "certificate" in frame}) >= 3, "the sign turns"
        progress.begin("export")
        assert "export" in frames(file, 0.5)[-1]
        progress.end()
        assert frames(file, 0.3) == [""], "nothing moves beside a result"
        progress.begin("again")
        assert "again" in frames(file, 0.3)[-1]
    assert "again" not in frames(file, 0.3)[-1], "and is gone with the command"
    with progress.logged(as_json=False, console=console):
        progress.begin("loading")
        assert progress.error("no such file") is False
        assert frames(file, 0.5) == [""], "so that the sentence stands alone"


def test_bars_move_without_an_update_and_name_the_phase(screen):
    console, file = screen
    with progress.logged(as_json=False, console=console):
        progress.begin("loading")
        with make_progress() as bars:
            bars.add_task("dense", total=10, note="loss 1.0")
            progress.begin("saliency")
            drawn = frames(file, 1.0)
            assert len({frame for frame in drawn if "saliency" in frame}) >= 3 and "loading" not in "".join(drawn)
        assert "saliency" in frames(file, 0.5)[-1], "the sign is back when the bars have ended"


def test_names_are_shown_as_they_are(screen):
    console, file = screen
    with progress.logged(as_json=False, console=console):
        progress.begin("loading runs/[/b][bold]x")
        assert "loading runs/[/b][bold]x" in frames(file, 0.5)[-1]
        with progress.Bars(console=console) as bars:
            bars.add_task("task [/i]", total=10)
            drawn = frames(file, 0.5)[-1]
            assert "task [/i]" in drawn and "[progress" not in drawn


def test_something_moves_in_all_of_a_run(screen, config, tmp_path):
    """By what is on the terminal at each moment, which no slow machine changes."""
    console, file = screen
    moving, ended = [], threading.Event()

    def look(sign):
        while not ended.wait(0.01):
            moving.append((sign.phase, sign.shown is not None or sign.bars > 0))

    with progress.logged(as_json=False, console=console):
        sign = progress._open.get()
        progress.begin("starting")
        watcher = threading.Thread(target=look, args=(sign,))
        watcher.start()
        start(config, tmp_path / "run", say=console.print)
        ended.set()
        watcher.join()
    still = "".join("." if moves else "#" for _, moves in moving)
    assert "##########" not in still, [phase for phase, moves in moving if not moves]
    seen = {phase for phase, _ in moving}
    assert {"loading", "search", "settle", "tune", "export", "report"} <= seen, seen
