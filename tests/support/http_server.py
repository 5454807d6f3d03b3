"""A real web server on loopback that serves a folder in ranges, and fails on demand as real ones do."""

from __future__ import annotations

import re
import socket
import struct
import threading
import time
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

STATUS_FAULTS = ("403", "404", "416", "429", "500", "503")
BODY_FAULTS = ("reset", "short", "stall", "trickle")
HEAD_FAULTS = ("ignore_range", "other_range", "no_size", "packed", "stall_before_head", "half_said")
FAULTS = STATUS_FAULTS + BODY_FAULTS + HEAD_FAULTS


@dataclass
class Fault:
    """The next `times` GET requests whose path holds `match` fail as `kind` says."""

    kind: str
    times: int
    match: str


@dataclass
class FileServer:
    """Serves `root`; a context manager. `requests` are (path, first byte, end) of all GETs; `tag` is put into every ETag."""

    root: Path
    tag: str = "a"
    requests: list[tuple[str, int, int]] = field(default_factory=list)
    delay_seconds: float = 0.0
    stall_seconds: float = 60.0

    def __post_init__(self) -> None:
        self._faults: list[Fault] = []
        self._lock = threading.Lock()
        self.released = threading.Event()

    def __enter__(self) -> FileServer:
        outer = self

        class Handler(_Handler):
            server_of_files = outer

        self._server = _QuietServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.released.set()
        self._server.shutdown()
        self._server.server_close()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_address[1]}"

    def inject(self, kind: str, times: int = 1, match: str = ".tar") -> None:
        assert kind in FAULTS
        with self._lock:
            self._faults.append(Fault(kind, times, match))

    def take(self, path: str) -> str:
        with self._lock:
            for fault in self._faults:
                if fault.times and fault.match in path:
                    fault.times -= 1
                    return fault.kind
        return ""

    def num_gets(self, path: str) -> int:
        return sum(one.endswith(path) for one, _, _ in self.requests)


class _QuietServer(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Clients that hang up are what is tested."""


class _Handler(BaseHTTPRequestHandler):
    server_of_files: FileServer
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: Any) -> None:
        """Silence."""

    def do_GET(self) -> None:
        server = self.server_of_files
        path = unquote(urlsplit(self.path).path)
        file = server.root / path.lstrip("/")
        span = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        content = file.read_bytes() if file.is_file() else b""
        start, end = (int(span[1]), min(int(span[2] or len(content)) + 1, len(content))) if span else (0, len(content))
        server.requests.append((path, start, end))
        if server.delay_seconds:
            time.sleep(server.delay_seconds)
        fault = server.take(path)
        if not file.is_file() or fault in STATUS_FAULTS or (span and start >= len(content)):
            return self._refuse(int(fault) if fault in STATUS_FAULTS else 404 if not file.is_file() else 416)
        if fault == "stall_before_head":
            server.released.wait(server.stall_seconds)
        whole = span is None or fault == "ignore_range"
        body = content if whole else content[start:end]
        self.send_response(200 if whole else 206)
        self.send_header("ETag", f'"{server.tag}-{len(content)}"')
        if not whole:
            shift = fault == "other_range"
            self.send_header("Content-Range", f"bytes {start + shift}-{end - 1 + shift}/{len(content)}")
        if fault == "packed":
            self.send_header("Content-Encoding", "gzip")
        if fault == "no_size":
            self.send_header("Transfer-Encoding", "chunked")
        else:
            self.send_header("Content-Length", str(len(body) // 2 if fault == "half_said" else len(body)))
        self.end_headers()
        self._send_body(body, fault)

    def _send_body(self, body: bytes, fault: str) -> None:
        half = body[: len(body) // 2]
        try:
            if fault == "no_size":
                self.wfile.write(b"%x\r\n" % len(half) + half + b"\r\n0\r\n\r\n")
            elif fault in ("", "other_range", "packed", "ignore_range", "stall_before_head"):
                self.wfile.write(body)
            elif fault == "trickle":
                for position in range(len(body)):
                    self.wfile.write(body[position : position + 1])
                    self.wfile.flush()
                    if self.server_of_files.released.wait(0.02):
                        return
            else:
                self.wfile.write(half)
                self.wfile.flush()
                self._break_off(fault)
        except OSError:
            self.close_connection = True

    def _break_off(self, fault: str) -> None:
        if fault == "stall":
            self.server_of_files.released.wait(self.server_of_files.stall_seconds)
        if fault == "reset":
            # Closing with unsent data and no lingering makes the kernel send RST instead of FIN.
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.connection.close()
        self.close_connection = fault != "half_said"

    def _refuse(self, status: int) -> None:
        self.send_response(status)
        if status == 429:
            self.send_header("Retry-After", "0")
        self.send_header("Content-Length", "0")
        self.end_headers()
