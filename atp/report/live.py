"""The page of a run while it trains, served on the loopback interface alone."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import urlsplit

from atp.ground.errors import InputError, shorten
from atp.ground.locking import holder
from atp.inputs.folders import CONFIG
from atp.report.files import read_run, standing
from atp.report.page import page_of

_LOOPBACK = "127.0.0.1"
_HOSTS = (_LOOPBACK, "localhost")  # by which a browser may ask: another name that leads here is a stranger's
_RECORDS = ("metrics.jsonl", "summary.json", "decisions.json", "certificate.json", "evaluation.json",
            "dense_lora/metrics.jsonl")  # fmt: skip
_POLL = 0.5  # seconds
# The page is text, style and drawings: a browser may load or run nothing for it.
_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; style-src 'unsafe-inline'; img-src data:",
    "Cache-Control": "no-store",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
}


def watch(
    run: Path,
    say: Callable[..., None],
    *,
    show: Callable[[str], None] = lambda text: None,
    port: int = 0,
    seconds: int = 10,
) -> None:
    """Serves a run's page until the run ends; browsers then get the page once more, without its reload.

    A run whose folder does not exist, or is empty, is waited for. say: takes a line, and as a second argument the
    page's address once it is served. show: takes `standing` whenever a record has changed. port: 0 takes a free one.
    seconds: from one reload of the page to the next. Raises `InputError` if no run is at work there, or the port is
    taken.
    """
    if run.exists() and not run.is_dir():
        raise InputError(f"{shorten(run)} is a file: give the output_dir of a run")
    if not run.is_dir() or not any(run.iterdir()):
        say(f"waiting for a run in {run}; Ctrl-C stops waiting")
        while not (run / CONFIG).is_file():
            time.sleep(_POLL)
    elif holder(run) is None:
        raise InputError(f"no process is at work in {shorten(run)}: see its page with atp report, or start it first")
    page_of(run, reload_seconds=seconds)  # refuses what is no run
    with _serving(run, port, seconds) as server:
        address = f"http://{_LOOPBACK}:{server.server_port}/"
        thread = threading.Thread(target=server.serve_forever, name="atp watch", daemon=True)
        thread.start()
        try:
            say(f"{run} is at {address} until it ends; Ctrl-C stops watching", address)
            records: tuple[object, ...] = ()
            while holder(run) is not None:
                if (now := tuple(_changed(run / name) for name in _RECORDS)) != records:
                    records = now
                    show(standing(read_run(run, under_way=True)))
                time.sleep(_POLL)
            server.page.over = True
            server.page.seen_to_the_end.wait(2 * seconds if server.page.was_asked_for else 0)
        finally:
            server.shutdown()
            thread.join()
    say(f"the run has ended: atp report {run} --open")


class _Page:
    """The page of a run, made anew only when its records have changed."""

    def __init__(self, run: Path, seconds: int) -> None:
        self.run, self.seconds = run, seconds
        self.over = self.was_asked_for = False
        self.seen_to_the_end = threading.Event()
        self._lock, self._text = threading.Lock(), ""
        self._made_from: tuple[object, ...] = ()

    def send(self, by: Callable[[str], None]) -> None:
        """Hands the page to `by`. Raises `InputError` if the folder holds no run any more."""
        self.was_asked_for = True
        with self._lock:
            over = self.over
            now = (over, *(_changed(self.run / name) for name in _RECORDS))
            if now != self._made_from:
                self._text = page_of(self.run, reload_seconds=None if over else self.seconds)
                self._made_from = now
            text = self._text
        by(text)
        if over:
            self.seen_to_the_end.set()


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    page: _Page

    def handle_error(self, request: object, client_address: object) -> None:
        """Says nothing of a client that has gone, or never says what it wants; of anything else, as Python does."""
        if not isinstance(sys.exception(), OSError):
            super().handle_error(request, client_address)  # type: ignore[arg-type]


def _serving(run: Path, port: int, seconds: int) -> _Server:
    try:
        server = _Server((_LOOPBACK, port), _Handler)
    except OSError as error:
        raise InputError(f"cannot listen on port {port} ({error.strerror}): choose another --port") from None
    server.page = _Page(run, seconds)
    return server


class _Handler(BaseHTTPRequestHandler):
    server: _Server
    timeout = 10  # seconds for a request: a silent client holds no thread

    def do_GET(self) -> None:
        """Sends the page to whoever asks for / by a loopback name."""
        try:
            host = urlsplit(f"//{self.headers.get('Host', '')}").hostname
        except ValueError:
            return self._send(HTTPStatus.BAD_REQUEST, "the header Host names no host", "text/plain")
        if host not in _HOSTS:
            self._send(HTTPStatus.FORBIDDEN, "this page is for this machine alone", "text/plain")
        elif self.path != "/":
            self._send(HTTPStatus.NOT_FOUND, "the page is at /", "text/plain")
        else:
            try:
                self.server.page.send(lambda text: self._send(HTTPStatus.OK, text, "text/html"))
            except InputError as error:
                self._send(HTTPStatus.INTERNAL_SERVER_ERROR, str(error), "text/plain")

    def _send(self, status: HTTPStatus, text: str, kind: str) -> None:
        content = text.encode("utf-8", "replace")
        self.send_response(status)
        for name, value in _HEADERS.items():
            self.send_header(name, value)
        self.send_header("Content-Type", f"{kind}; charset=utf-8")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, format: str, *args: object) -> None:
        """Says nothing: the terminal belongs to the command."""


def _changed(path: Path) -> tuple[int, int] | None:
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_mtime_ns, found.st_size
