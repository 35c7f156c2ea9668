"""A real HTTP server of a folder that can be told to misbehave, for tests of shards that come from elsewhere."""

from __future__ import annotations

import http.server
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

BLOCK = bytes(1 << 16)
MOST_BLOCKS = 2_000  # of a reply without end: 131 MB


class FileServer(http.server.ThreadingHTTPServer):
    """Serves ``folder``; ``mischief`` of a file is done in place of its next replies, one after the other."""

    daemon_threads = True

    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.folder = folder
        self.requests: Counter[str] = Counter()
        self.queries: set[str] = set()
        self.mischief: dict[str, list[Callable[[_Handler, bytes], None]]] = {}
        self.blocks_sent = 0
        self.halfway, self.released = threading.Event(), threading.Event()

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def misbehave(self, file: str, *how: Callable[[_Handler, bytes], None], times: int = 1) -> None:
        self.mischief[file] = [*how] * times


class _Handler(http.server.BaseHTTPRequestHandler):
    server: FileServer

    def do_GET(self) -> None:
        path, _, query = self.path.partition("?")
        file = path.removeprefix("/")
        self.server.requests[file] += 1
        self.server.queries.add(query)
        found = self.server.folder / file
        data = found.read_bytes() if found.is_file() else None
        waiting = self.server.mischief.get(file)
        try:
            if waiting:
                waiting.pop(0)(self, data or b"")
            elif data is None:
                self.send_error(404)
            else:
                send(self, data)
        except (BrokenPipeError, ConnectionResetError):
            pass  # the other side has heard enough

    def log_message(self, *_: object) -> None:
        """Tests are quiet."""


def send(handler: _Handler, data: bytes, length: int | None = None) -> None:
    handler.send_response(200)
    handler.send_header("Content-Length", str(len(data) if length is None else length))
    handler.end_headers()
    handler.wfile.write(data)


def cut(handler: _Handler, data: bytes) -> None:
    """Half of the file, and the connection is gone."""
    send(handler, data[: len(data) // 2], len(data))


def cut_unnoticed(handler: _Handler, data: bytes) -> None:
    """Half of the file in a reply that claims to be whole."""
    send(handler, data[: len(data) // 2])


def flip(handler: _Handler, data: bytes) -> None:
    """One bit of the file is another."""
    send(handler, data[:-9] + bytes([data[-9] ^ 16]) + data[-8:])


def stall(handler: _Handler, data: bytes) -> None:
    """Half of the file, then nothing until ``released``."""
    handler.send_response(200)
    handler.send_header("Content-Length", str(len(data)))
    handler.end_headers()
    handler.wfile.write(data[: len(data) // 2])
    handler.server.halfway.set()
    handler.server.released.wait(20)
    handler.wfile.write(data[len(data) // 2 :])


def endless(handler: _Handler, data: bytes) -> None:
    """The file, and more behind it without end; no length is told."""
    handler.send_response(200)
    handler.end_headers()
    handler.wfile.write(data)
    for _ in range(MOST_BLOCKS):
        handler.wfile.write(BLOCK)
        handler.server.blocks_sent += 1


def slow(handler: _Handler, data: bytes) -> None:
    """The whole file, a while later: others that want it come meanwhile."""
    handler.server.released.wait(0.2)
    send(handler, data)


def error(code: int) -> Callable[[_Handler, bytes], None]:
    return lambda handler, _: handler.send_error(code)


def redirect(address: str) -> Callable[[_Handler, bytes], None]:
    def reply(handler: _Handler, _: bytes) -> None:
        handler.send_response(302)
        handler.send_header("Location", address)
        handler.send_header("Content-Length", "0")
        handler.end_headers()

    return reply


@contextmanager
def serving(folder: Path) -> Iterator[FileServer]:
    """A server of ``folder`` on this machine."""
    with FileServer(folder) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
        thread.start()
        try:
            yield server
        finally:
            server.released.set()
            server.shutdown()
