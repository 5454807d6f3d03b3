"""A real web server on the loopback that serves shards badly."""

from __future__ import annotations

import re
import socket
import struct
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Literal

from benchmarks.faults.case import Case
from benchmarks.faults.corpus import healthy, pack


@dataclass(frozen=True)
class Manners:
    """How requests for bytes of a shard are answered wrongly.

    Attributes:
        kind: A status, a reset or an end in the middle of the body, silence, another body, a whole file where a part was asked for, a part
            that lies elsewhere than the answer says, a body that somebody compressed, or a way in circles.
        first: Requests that are answered well before it.
        times: Requests that are answered so.
        status: Of `status`.
        seconds: Of `stall`.
    """

    kind: Literal["status", "reset", "short", "stall", "wrong", "whole", "elsewhere", "gzip", "circle"]
    first: int = 0
    times: int = 1
    status: int = 500
    seconds: float = 0.0


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, folder: Path, manners: Manners) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.folder, self._manners, self._count, self._lock = folder, manners, 0, threading.Lock()

    def manners(self) -> Manners | None:
        """How the next request is answered wrongly; None for well."""
        with self._lock:
            number, self._count = self._count, self._count + 1
        return self._manners if self._manners.first <= number < self._manners.first + self._manners.times else None

    def handle_error(self, request: object, client_address: object) -> None:
        """Clients hang up on what they are served here."""


@contextmanager
def serving(folder: Path, manners: Manners) -> Iterator[str]:
    """Serve a folder; yields its URL. Only shards are served badly, their indexes well."""
    server = _Server(folder, manners)
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class _Handler(BaseHTTPRequestHandler):
    server: _Server
    protocol_version = "HTTP/1.1"

    def log_message(self, *arguments: object) -> None:
        """Nothing: what happens is in the verdicts."""

    def do_HEAD(self) -> None:
        self._answer(with_body=False)

    def do_GET(self) -> None:
        try:
            self._answer(with_body=True)
        except (BrokenPipeError, ConnectionResetError):
            self.close_connection = True

    def _answer(self, *, with_body: bool) -> None:
        path = self.server.folder / self.path.lstrip("/").partition("?")[0]
        if not path.is_file():
            self._send(404, b"", {}, with_body=with_body)
            return
        content = path.read_bytes()
        total, asked = len(content), re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        headers = {"Accept-Ranges": "bytes", "ETag": f'"{total}-{hash(content)}"'}
        start, end = 0, total
        if asked:
            start, end = int(asked[1]), min(int(asked[2]) + 1 if asked[2] else total, total)
            if start >= total:
                self._send(416, b"", {"Content-Range": f"bytes */{total}"}, with_body=with_body)
                return
            headers["Content-Range"] = f"bytes {start}-{end - 1}/{total}"
        body = content[start:end]
        # The first byte alone is how readers ask for the size.
        manners = self.server.manners() if with_body and path.suffix == ".tar" and len(body) > 1 else None
        if manners is None:
            self._send(206 if asked else 200, body, headers, with_body=with_body)
        else:
            self._misbehave(manners, body, content, headers, status=206 if asked else 200)

    def _misbehave(self, manners: Manners, body: bytes, content: bytes, headers: dict[str, str], *, status: int) -> None:
        half, kind = len(body) // 2, manners.kind
        if kind == "status":
            self._send(manners.status, b"no", {})
        elif kind == "circle":
            self._send(302, b"", {"Location": self.path})
        elif kind == "wrong":
            self._send(status, body[:half] + bytes(len(body) - half), headers)
        elif kind == "whole":
            self._send(200, content, {"ETag": headers["ETag"]})
        elif kind == "elsewhere":
            self._send(status, content[: len(body)], {**headers, "Content-Range": f"bytes 0-{len(body) - 1}/{len(content)}"})
        elif kind == "gzip":
            self._send(status, body, {**headers, "Content-Encoding": "gzip"})
        elif kind == "stall":
            self._send(status, body[:half], headers, stated=len(body))
            time.sleep(manners.seconds)
            self.close_connection = True
        else:
            self._send(status, body[:half], headers, stated=len(body))
            if kind == "reset":
                # With nothing to linger for, closing sends a reset instead of an end.
                self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.close_connection = True

    def _send(self, status: int, body: bytes, headers: dict[str, str], *, with_body: bool = True, stated: int | None = None) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body) if stated is None else stated))
        self.end_headers()
        if with_body:
            self.wfile.write(body)
            self.wfile.flush()


def errors_once(canary: Path) -> Iterator[Case]:
    """A status that may pass, a reset, a short body or silence, once."""
    for status in (500, 502, 503, 504, 429, 408):
        yield _case(f"status {status}", Manners("status", status=status), passes=True)
    for kind in ("reset", "short"):
        for first in (0, 1):
            yield _case(f"{kind} at request {first}", Manners(kind, first=first), passes=True)
    yield _case("silence", Manners("stall", seconds=3.0), passes=True)


def errors_always(canary: Path) -> Iterator[Case]:
    """The same for ever, and what will never pass."""
    for status in (404, 403, 410):
        yield _case(f"status {status}", Manners("status", times=1 << 30, status=status))
    for kind in ("reset", "short"):
        yield _case(kind, Manners(kind, times=1 << 30))
    yield _case("status 500", Manners("status", times=1 << 30))


def lies(canary: Path) -> Iterator[Case]:
    """Servers that say something else than they send, once and always."""
    for kind in ("wrong", "whole", "elsewhere", "gzip", "circle"):
        yield _case(f"{kind}, once", Manners(kind), passes=True)
        yield _case(f"{kind}, always", Manners(kind, times=1 << 30))


def _case(name: str, manners: Manners, *, passes: bool = False) -> Case:
    return Case(name, pack(healthy()), healthy(), server=manners, passes=passes)
