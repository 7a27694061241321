"""The page, served to this machine alone, that follows runs as they go: `collage report --watch`."""

from __future__ import annotations

import errno
import json
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

from markupsafe import Markup

from collage.report.differences import differences
from collage.report.follow import Follower
from collage.report.groups import group_runs
from collage.report.page import Texts, context, html, texts
from collage.report.view import view
from collage.report.write import summary_of
from collage.train.config import UserError

HOST = "127.0.0.1"
PORT = 8420
"""The first port that is tried where none is asked for; the next ones are tried where it is taken."""

TRIED = 20
EVERY_MS = 2000
"""Milliseconds between two questions of the page for new records."""


@dataclass(frozen=True)
class Snapshot:
    """All that the page shows of the runs at one moment; the version rises with every change."""

    version: int
    texts: Texts
    data: dict[str, Any]

    def page(self) -> str:
        """The whole page."""
        return html(self.texts, {"version": self.version, **self.data}, live=EVERY_MS)

    def message(self) -> str:
        """What changes in a page that is open, as JSON."""
        shown = {"title": self.texts.title, "before": self.texts.before, "after": self.texts.after}
        return json.dumps({"version": self.version, "view": self.data, **shown}, allow_nan=False)


class Live:
    """The runs in `directories` as the page shows them; files are looked at when somebody asks, never in between."""

    def __init__(self, directories: Sequence[Path]) -> None:
        self._follower = Follower(directories)
        self._lock = threading.Lock()
        self._stale = True
        self._snapshot = Snapshot(0, Texts("", "", ""), {})

    def snapshot(self) -> Snapshot:
        """The newest state. Raises UserError where files can't be read, or runs not be shown together."""
        with self._lock:
            self._stale |= self._follower.read()
            if self._stale:
                self._snapshot = Snapshot(self._snapshot.version + 1, *self._shown())
                self._stale = False
            return self._snapshot

    def _shown(self) -> tuple[Texts, dict[str, Any]]:
        runs, directories = self._follower.runs, self._follower.directories
        if not runs:
            return _waiting(directories), view([])
        groups = group_runs(runs)
        entries = context(summary_of(directories, runs), differing=differences(groups))
        return texts(entries), view(groups)


def _waiting(directories: Sequence[Path]) -> Texts:
    names = ", ".join(map(str, directories))
    before = Markup("<header><h1>Waiting for runs</h1><p>There is none yet in {}, nor one folder below.</p></header>")
    return Texts("Waiting for runs", before.format(names), "")


class _Handler(BaseHTTPRequestHandler):
    """Answers / with the page and /data.json?known=VERSION with what is newer than that, 204 where nothing is."""

    server: _Server  # pyright: ignore[reportIncompatibleVariableOverride] - it is made by no other

    def do_GET(self) -> None:
        address = urlsplit(self.path)
        answers: dict[str, Callable[[str], None]] = {"/": self._page, "/data.json": self._data}
        if self.headers.get("Host") not in self.server.names:
            # Another site's page, whose name was made to point here, must not read what runs hold.
            return self._send(HTTPStatus.FORBIDDEN, "text/plain", "open the address that the command printed\n")
        if address.path not in answers:
            return self._send(HTTPStatus.NOT_FOUND, "text/plain", "there is only the page, /\n")
        try:
            answers[address.path](address.query)
        except UserError as error:
            self._send(HTTPStatus.SERVICE_UNAVAILABLE, "text/plain", f"{error}\n")
        except BrokenPipeError:
            pass  # the page was closed while it was sent

    def _page(self, query: str) -> None:
        self._send(HTTPStatus.OK, "text/html", self.server.live.snapshot().page())

    def _data(self, query: str) -> None:
        snapshot = self.server.live.snapshot()
        if parse_qs(query).get("known") == [str(snapshot.version)]:
            return self._send(HTTPStatus.NO_CONTENT, "application/json", "")
        self._send(HTTPStatus.OK, "application/json", snapshot.message())

    def _send(self, status: HTTPStatus, kind: str, text: str) -> None:
        body = text.encode()
        self.send_response(status)
        self.send_header("Content-Type", f"{kind}; charset=utf-8")
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Cache-Control", "no-store")
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing: a line for every question would bury the address."""


class _Server(ThreadingHTTPServer):
    def __init__(self, port: int, live: Live) -> None:
        super().__init__((HOST, port), _Handler)
        self.live = live
        self.names = {f"{name}:{self.server_port}" for name in (HOST, "localhost")}


def _bind(live: Live, port: int | None) -> _Server:
    if port is not None:
        try:
            return _Server(port, live)
        except OSError as error:
            raise UserError(
                f"--port must be a port that can be listened on, got {port}: {error.strerror}; give another, or leave "
                "--port out for the next free one"
            ) from error
    for tried in range(PORT, PORT + TRIED):
        try:
            return _Server(tried, live)
        except OSError as error:
            if error.errno != errno.EADDRINUSE:
                raise
    raise UserError(f"none of the ports {PORT} to {PORT + TRIED - 1} is free on {HOST}; give another, by --port")


def serve(directories: Sequence[Path], port: int | None) -> ThreadingHTTPServer:
    """A server on 127.0.0.1 with the page of the runs in `directories`; arguments and errors as of `watch`."""
    live = Live(directories)
    live.snapshot()
    return _bind(live, port)


def watch(directories: Sequence[Path], port: int | None, say: Callable[[str], None]) -> None:
    """Serve the page of the runs in `directories`, on 127.0.0.1 alone, until Ctrl-C.

    Args:
        directories: of runs or comparisons; they may be without runs yet.
        port: None: the first free one from 8420 on; 0: any.
        say: prints a line.

    Raises:
        UserError: a directory is none, files can't be read, or there is no free port.
    """
    with serve(directories, port) as server:
        try:
            say(f"following {', '.join(map(str, directories))} at http://{HOST}:{server.server_port}/ (Ctrl-C ends)")
            server.serve_forever(poll_interval=0.1)
        except KeyboardInterrupt:
            say("stopped; for a page to keep: collage report " + " ".join(map(str, directories)))
