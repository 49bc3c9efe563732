"""`atp watch` and `atp runs`: run folders at work, finished and stopped."""

import http.client
import io
import json
import random
import socket
import struct
import threading
import time
from contextlib import suppress
from pathlib import Path

import pytest
from rich.console import Console

from atp.cli.cli import results
from atp.ground.errors import InputError
from atp.ground.listing import runs_below
from atp.ground.locking import holder, locked
from atp.report.files import RunFiles, standing
from atp.report.live import _serving, watch

STEP = {"step": 4, "phase": "search", "loss": 1.5, "keep": 0.75, "tokens_per_second": 10.0, "time": 1.0}


@pytest.fixture
def run(tmp_path):
    """A run that has logged one step, with half a line after it."""
    folder = tmp_path / "runs" / "mine"
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text("training: {steps: 10}\n")
    (folder / "metrics.jsonl").write_text(json.dumps(STEP) + '\n{"step": 5, "pha')
    (folder / "evaluation.json").write_text('{"original": {"perplexity": 20.5}}')
    return folder


def test_states_and_figures(run, tmp_path):
    (run / "dense_lora").mkdir()
    (run / "dense_lora" / "config.yaml").touch()
    (run / "dense_lora" / "metrics.jsonl").touch()
    (line,) = runs_below(tmp_path / "runs")
    assert (line.state, line.phase, line.step, line.loss, line.kept) == ("stopped", "search", 4, 1.5, 0.75)
    assert (line.perplexity_before, line.perplexity, line.minutes) == (20.5, None, None)
    score = {"step": 6, "phase": "tune", "validation_loss": 1.2}  # after the last step, which hides no loss
    (run / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in (STEP, score)))
    (line,) = runs_below(run)
    assert (line.phase, line.step, line.loss, line.kept) == ("tune", 6, 1.5, 0.75)
    with locked(run):
        assert holder(run).startswith("process ") and runs_below(run)[0].state == "running"
    summary = {"keep_decoder": 0.6, "perplexity": {"final": 18.0}, "megabytes": {"final": 7}, "seconds": {"total": 90}}
    (run / "summary.json").write_text(json.dumps(summary))
    (line,) = runs_below(tmp_path)
    assert (line.state, line.kept, line.perplexity, line.megabytes, line.minutes) == ("finished", 0.6, 18, 7, 1.5)


@pytest.mark.parametrize("content", ["", "{", "[]", '{"seconds": 3, "perplexity": [], "keep_decoder": ""}', "\x00\xff"])
def test_damaged_records_are_missing_ones(run, content):
    for name in ("summary.json", "evaluation.json", "metrics.jsonl"):
        (run / name).write_text(content, encoding="latin-1")
    (line,) = runs_below(run)
    assert (line.perplexity, line.minutes, line.step, line.kept) == (None, None, None, None)


def test_the_command_lists_them(run, tmp_path, atp):
    assert json.loads(atp("runs", tmp_path, "--json")[1])[0]["state"] == "stopped"
    head, line = atp("runs", run.parent)[1].splitlines()
    assert head.split()[-2:] == ["minutes", "changed"] and line.startswith(f"{run} ") and len(line.split()) == 9
    assert atp("runs", tmp_path / "absent")[0] == 2
    (tmp_path / "empty").mkdir()
    assert atp("runs", tmp_path / "empty")[:2] == (0, f"there is no run folder in {tmp_path / 'empty'}\n")


@pytest.mark.parametrize("width", [80, 200])
def test_names_are_whole_and_nothing_is_left_out_in_a_narrow_terminal(run, tmp_path, monkeypatch, width):
    long = run.parent / "quite-a-long-name-of-a-run-that-somebody-gave"
    run.rename(long)
    out = io.StringIO()
    terminal = Console(width=width, file=out, force_terminal=True, color_system=None, highlight=False)
    monkeypatch.setattr(results, "console", terminal)
    monkeypatch.chdir(tmp_path)
    results.runs(Path("runs"))
    lines = out.getvalue().splitlines()
    assert len(lines) == (2 if width == 200 else 4) and all(len(line) <= width for line in lines)
    name, *figures = " ".join(lines[-2 if width == 80 else -1 :]).split()
    assert name == "runs/quite-a-long-name-of-a-run-that-somebody-gave"
    assert figures[:6] == ["stopped", "search", "4", "1.500", "0.750", "20.50"] and len(figures) == 8, "and a date"


def ask(port, path="/", host="127.0.0.1"):
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    connection.request("GET", path, headers={"Host": host})
    answer = connection.getresponse()
    return answer.status, answer.read().decode(), answer.headers


def test_a_run_is_watched_until_it_ends(run):
    said, served = [], threading.Event()

    def say(line, address=None):
        said.append(line)
        if address:
            said.append(int(address.rstrip("/").rpartition(":")[2]))
            served.set()

    with locked(run):
        thread = threading.Thread(target=watch, args=(run, say), kwargs={"seconds": 1})
        thread.start()
        assert served.wait(60)
        port = said[1]
        status, page, headers = ask(port)
        assert status == 200 and 'http-equiv="refresh" content="1"' in page and "The run is at work" in page
        assert headers["Content-Security-Policy"].startswith("default-src 'none'")
        assert ask(port, host="evil.example")[0] == 403 and ask(port, path="/../config.yaml")[0] == 404
        with (run / "metrics.jsonl").open("a") as lines:
            lines.write("\n" + json.dumps(STEP | {"phase": "cooling"}) + "\n")
        assert "cooling" in ask(port)[1], "and shows what is new"
        assert not (run / "report.html").exists()
        (run / "summary.json").write_text("{}")
    end = time.monotonic() + 60
    while "refresh" in (page := ask(port)[1]) and time.monotonic() < end:
        time.sleep(0.05)
    assert "refresh" not in page, "the last page stays"
    thread.join(60)
    assert not thread.is_alive() and said[-1].startswith("the run has ended")
    with pytest.raises(ConnectionError):
        ask(port)


def test_only_a_run_at_work_is_watched(run, tmp_path):
    for folder, sentence in ((run, "no process is at work"), (run / "config.yaml", "is a file")):
        with pytest.raises(InputError, match=sentence):
            watch(folder, print)
    (tmp_path / "other").mkdir()
    with locked(tmp_path / "other"), pytest.raises(InputError, match="not a run folder"):
        watch(tmp_path / "other", print)


@pytest.mark.parametrize("there", [True, False])
def test_a_run_that_has_not_begun_is_waited_for(run, tmp_path, there):
    said, shown, waited = [], [], threading.Event()

    def say(line, address=None):
        said.append(line)
        waited.set()

    folder = tmp_path / "later"
    if there:
        folder.mkdir()
    options = {"seconds": 1, "show": shown.append}
    thread = threading.Thread(target=watch, args=(folder, say), kwargs=options, daemon=True)
    thread.start()
    assert waited.wait(60) and said == [f"waiting for a run in {folder}; Ctrl-C stops waiting"]
    with locked(run):
        if there:
            folder.rmdir()
        run.rename(folder)
        end = time.monotonic() + 60
        while not shown and time.monotonic() < end:
            time.sleep(0.05)
    thread.join(60)
    assert said[1].startswith(f"{folder} is at http") and said[2].startswith("the run has ended") and len(said) == 3
    assert shown == ["search, step 4 of 10"]


@pytest.mark.parametrize("at_work", [True, False])
def test_ctrl_c_ends_watching_without_an_error(run, monkeypatch, atp, at_work):
    def interrupt(seconds):
        raise KeyboardInterrupt

    monkeypatch.setattr("atp.report.live.time.sleep", interrupt)
    with locked(run):
        code, out, err = atp("watch", run if at_work else run.parent / "absent")
    assert code == 0 and err == ""
    assert ("search, step 4 of 10" in out) == at_work == ("waiting for a run" not in out)


def records(phase, *steps, pace=3.0):
    return [{"step": s, "phase": phase, "loss": 1.0, "phase_seconds": 100 + pace * (s - steps[0])} for s in steps]


@pytest.mark.parametrize(
    ("metrics", "dense", "told"),
    [
        ([], [], "before the first step"),
        (records("open", 2), [], "open, step 2 of 400"),
        (records("open", 10, 20, 30), [], "open, step 30 of 400, about 18 min of training left"),
        (records("open", 10, 20) + records("tune", 380), [], "tune, step 380 of 400, about 60 s of training left"),
        (records("tune", 10, 400), [], "tune, step 400 of 400"),
        ([], records("dense_lora", 100, 200, pace=0.5), "dense lora, step 200 of 400, about 2 min of this part left"),
    ],
)
def test_what_is_told_of_a_run_at_work(metrics, dense, told):
    assert standing(RunFiles("mine", metrics, dense=dense, config="training: {steps: 400}")) == told
    certified = RunFiles("mine", metrics, dense=dense, certificate={"masked_vs_cut": 0.0})
    assert standing(certified) == "trained; scores, speed and report follow"
    damaged = RunFiles("mine", metrics, dense=dense, config="[")
    assert standing(damaged) == told.partition(" of")[0]


def test_report_opens_the_browser(run, monkeypatch, atp):
    opened = []
    monkeypatch.setattr("webbrowser.open", lambda address: bool(opened.append(address)))
    _, out, _ = atp("report", run, "--open")
    assert "refresh" not in (run / "report.html").read_text(encoding="utf-8"), "a page that is written does not reload"
    assert opened == [(run / "report.html").resolve().as_uri()] and "no browser was found" in out


@pytest.fixture
def server(run, capfd):
    served = _serving(run, 0, 1)
    served.daemon_threads = False  # so that closing waits for what the threads print
    thread = threading.Thread(target=served.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield served
    served.shutdown()
    thread.join()
    served.server_close()
    assert capfd.readouterr().err == ""


def raw(server, request, *, stays=True):
    """The bytes that a request gets. stays: whether the client reads the answer, or resets the connection instead."""
    answer = b""
    with socket.create_connection(server.server_address, timeout=30) as client, suppress(OSError):
        client.sendall(request)
        if not stays:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            return b""
        client.shutdown(socket.SHUT_WR)  # fails where the server closed before it had read everything
        while part := client.recv(65536):
            answer += part
    return answer


HOSTS = ["[::1", "[::1]x", "[", "]", "[v1]", "a\u2100b", "127.0.0.1:x", "127.0.0.1:99999", "\x00", "@", "", "localhost"]


def test_any_request_gets_an_answer_or_none_and_leaves_the_terminal_alone(server):
    for host in HOSTS:
        answer = raw(server, b"GET / HTTP/1.1\r\nHost: " + host.encode() + b"\r\nConnection: close\r\n\r\n")
        allowed = (200,) if host.startswith(("127", "local")) else (400,) if host == "[::1" else (400, 403)
        assert int(answer.split()[1]) in allowed, (host, answer)
    draw = random.Random(0)
    good = b"GET / HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: 3\r\nX: y\r\n\r\n"
    pieces = [b"\r\n", b"\n", b" ", b":", b"\x00", b"\xff" * 9, b"[", b"HTTP/9.9", b"//", b"x" * 70000, b"Host: [::1"]
    for number in range(40):
        request = bytearray(good)
        for _ in range(draw.randint(1, 4)):
            at = draw.randrange(len(request) + 1)
            request[at : at + draw.choice((0, 1, 9))] = draw.choice(pieces)
        raw(server, bytes(request[: draw.randint(1, len(request))]), stays=number % 3 > 0)
    for _ in range(20):
        raw(server, good, stays=False)
    assert raw(server, good).startswith(b"HTTP/1.0 200"), "and the page is still served"
