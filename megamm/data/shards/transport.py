"""One request to a server, checked: the bytes asked for of the file that was meant, or an error that says of which kind.

http(s) goes through urllib3 and not through fsspec, whose web file system asks for a range but takes any answer: a server that
ignores ranges would send a whole shard for every block, and a file that was replaced would be noticed by nobody. Everything
else (`s3://`, `gs://`, `hf://`, ...) goes through fsspec.
"""

from __future__ import annotations

import re
import time
import urllib.request
from dataclasses import dataclass
from typing import Any, Protocol
from urllib.parse import urlsplit

from megamm.core.errors import ConfigError

_PIECE_BYTES = 1 << 18
_MAX_CONNECTIONS = 32
_TRANSIENT_STATUS = frozenset({408, 425, 429, *range(500, 600)})
_FIX = "pip install 'megamm[remote]'"


class TransientError(OSError):
    """A request failed in a way that may pass.

    Attributes:
        wait_seconds: How long the server asks to be left alone; 0 where it says nothing.
    """

    def __init__(self, reason: str, wait_seconds: float = 0.0) -> None:
        super().__init__(reason)
        self.wait_seconds = wait_seconds


class ChangedError(OSError):
    """The file is another one than it was."""


class NoRangesError(OSError):
    """The server sends whole files only."""


@dataclass(frozen=True, slots=True)
class RemoteFile:
    """What a server says of a file: its size, and its ETag or time of change (empty where it says neither)."""

    size: int
    tag: str


class Transport(Protocol):
    """Requests to one kind of server. Used from many threads.

    No message of an error holds more of a URL than the host, because addresses may carry signatures.
    """

    def stat(self, url: str) -> RemoteFile:
        """Size and tag of a file.

        Raises:
            FileNotFoundError: There is no such file.
            PermissionError: The server refuses it.
            TransientError: Anything that may pass.
        """
        ...

    def fetch(self, url: str, start: int, end: int, expected: RemoteFile) -> bytes:
        """Exactly the bytes from `start` to `end` (not included).

        Raises:
            ChangedError: The file is not the expected one any more.
            NoRangesError: The server has never sent a part of a file.
            FileNotFoundError: As `stat`.
            PermissionError: As `stat`.
            TransientError: As `stat`.
        """
        ...

    def close(self) -> None:
        """Drop connections."""
        ...


def open_transport(url: str, timeout_seconds: float) -> Transport:
    """The transport of a URL's scheme.

    Raises:
        ConfigError: The scheme is unknown, or what it needs is not installed.
    """
    if urlsplit(url).scheme in ("http", "https"):
        return HttpTransport(timeout_seconds)
    return FsspecTransport(url, timeout_seconds)


class HttpTransport:
    """Ranged GET requests over a pool of connections; proxies as the environment says.

    State: the connections, and which servers have sent a range.
    """

    def __init__(self, timeout_seconds: float) -> None:
        try:
            import urllib3
        except ImportError:
            raise ConfigError(f"reading http:// and https:// shards needs urllib3; {_FIX}") from None
        self._urllib3, self._timeout_seconds = urllib3, timeout_seconds
        self._pools: dict[str | None, Any] = {}
        self._with_ranges: set[str] = set()

    def stat(self, url: str) -> RemoteFile:
        """See `Transport.stat`. A ranged GET, because signed URLs and some servers take no HEAD."""
        try:
            response, found = self._get(url, 0, 1)
        except ChangedError:
            # No first byte to send.
            return RemoteFile(0, "")
        if response.status == 200:
            response.close()
        else:
            response.drain_conn()
            response.release_conn()
        return found

    def fetch(self, url: str, start: int, end: int, expected: RemoteFile) -> bytes:
        """See `Transport.fetch`."""
        deadline = time.monotonic() + self._timeout_seconds
        response, found = self._get(url, start, end)
        try:
            if found != expected:
                raise ChangedError(_difference(expected, found))
            if response.status == 200 and (start, end) != (0, found.size):
                # One that has sent a range may have others beside it that do not; one that never has, `stat` included, will not.
                raise TransientError("the server ignores ranges") if urlsplit(url).netloc in self._with_ranges else NoRangesError
            content = self._body(response, end - start, deadline)
        except BaseException:
            # What is left of the body must not be taken for the next answer.
            response.close()
            raise
        response.release_conn()
        return content

    def close(self) -> None:
        """See `Transport.close`."""
        for pool in self._pools.values():
            pool.clear()

    def _get(self, url: str, start: int, end: int) -> tuple[Any, RemoteFile]:
        headers = {"Range": f"bytes={start}-{end - 1}", "Accept-Encoding": "identity", "User-Agent": "megamm"}
        try:
            response = self._pool(url).request("GET", url, headers=headers, preload_content=False, decode_content=False)
        except self._urllib3.exceptions.HTTPError as error:
            raise TransientError(_innermost(error)) from None
        try:
            found = _checked_answer(response, start, end)
        except OSError:
            response.close()
            raise
        if response.status == 206:
            self._with_ranges.add(urlsplit(url).netloc)
        return response, found

    def _body(self, response: Any, size: int, deadline: float) -> bytes:
        pieces, num_bytes = [], 0
        try:
            # Not `read`: it comes back only when all bytes are there, and a server that sends one a second would never be late.
            while num_bytes < size and (piece := response.read1(min(_PIECE_BYTES, size - num_bytes))):
                pieces.append(piece)
                num_bytes += len(piece)
                if num_bytes < size and time.monotonic() > deadline:
                    raise TransientError(f"{num_bytes} of {size} bytes after {self._timeout_seconds:g} s")
        except self._urllib3.exceptions.HTTPError as error:
            raise TransientError(f"{_innermost(error)} after {num_bytes} of {size} bytes") from None
        if num_bytes != size:
            raise TransientError(f"{num_bytes} of {size} bytes came")
        return b"".join(pieces)

    def _pool(self, url: str) -> Any:
        parts = urlsplit(url)
        proxy = None if urllib.request.proxy_bypass(parts.hostname or "") else urllib.request.getproxies().get(parts.scheme)
        if proxy not in self._pools:
            options: dict[str, Any] = {
                "num_pools": 64,
                "maxsize": _MAX_CONNECTIONS,
                "timeout": self._urllib3.Timeout(connect=self._timeout_seconds, read=self._timeout_seconds),
                # Whoever asks decides about further tries; redirects alone are followed here.
                "retries": self._urllib3.Retry(total=None, connect=0, read=0, status=0, other=0, redirect=5),
            }
            if proxy is None:
                self._pools[proxy] = self._urllib3.PoolManager(**options)
            else:
                secret = self._urllib3.util.parse_url(proxy).auth
                headers = self._urllib3.make_headers(proxy_basic_auth=secret) if secret else None
                self._pools[proxy] = self._urllib3.ProxyManager(proxy, proxy_headers=headers, **options)
        return self._pools[proxy]


class FsspecTransport:
    """Ranged reads through fsspec, each within the time limit where the file system is an asynchronous one (s3, gs, abfs)."""

    def __init__(self, url: str, timeout_seconds: float) -> None:
        scheme = urlsplit(url).scheme
        try:
            import fsspec

            kind: Any = fsspec.get_filesystem_class(scheme)
        except ImportError as error:
            needed = "fsspec" if "fsspec" in str(error) else f"the fsspec package of {scheme}"
            raise ConfigError(f"reading {scheme}:// shards needs {needed}; {_FIX} brings http and s3") from None
        except ValueError:
            raise ConfigError(f"shards cannot be read from {scheme}://; fsspec knows no such scheme") from None
        options = dict(kind._get_kwargs_from_urls(url))
        if scheme in ("s3", "s3a"):
            options["config_kwargs"] = {
                "connect_timeout": timeout_seconds,
                "read_timeout": timeout_seconds,
                "retries": {"max_attempts": 0},
                "max_pool_connections": _MAX_CONNECTIONS,
            }
        self._fs = kind(**options, use_listings_cache=False, skip_instance_cache=True)
        # s3fs's own further tries would multiply with ours.
        self._fs.retries = 1
        self._scheme, self._timeout_seconds = scheme, timeout_seconds

    def stat(self, url: str) -> RemoteFile:
        """See `Transport.stat`."""
        info = self._call("info", self._fs._strip_protocol(url))
        if info.get("type") == "directory":
            raise FileNotFoundError("a folder")
        tag = next(
            (str(info[name]) for name in ("ETag", "etag", "LastModified", "last_modified", "mtime", "updated") if info.get(name)), ""
        )
        return RemoteFile(int(info["size"]), tag)

    def fetch(self, url: str, start: int, end: int, expected: RemoteFile) -> bytes:
        """See `Transport.fetch`; of these file systems only `stat` tells a changed file."""
        content = self._call("cat_file", self._fs._strip_protocol(url), start=start, end=end)
        if len(content) != end - start:
            raise TransientError(f"{len(content)} bytes came instead of {end - start}")
        return content

    def glob(self, url: str) -> list[str]:
        """URLs of the files that a glob names, sorted.

        Raises:
            PermissionError: The server refuses to list.
            TransientError: Anything that may pass.
        """
        return sorted(f"{self._scheme}://{path.partition('://')[2] or path}" for path in self._call("glob", self._fs._strip_protocol(url)))

    def close(self) -> None:
        """See `Transport.close`; the file system closes its connections when it is collected."""

    def _call(self, name: str, *arguments: Any, **options: Any) -> Any:
        try:
            if not self._fs.async_impl:
                return getattr(self._fs, name)(*arguments, **options)
            from fsspec.asyn import sync

            # A listing is many requests, each with the limit of its own that the client was given.
            limit = None if name == "glob" else self._timeout_seconds
            return sync(self._fs.loop, getattr(self._fs, f"_{name}"), *arguments, timeout=limit, **options)
        except (FileNotFoundError, IsADirectoryError):
            raise FileNotFoundError(name) from None
        except Exception as error:
            # Every file system has errors of its own, often with whole addresses in their words: kinds and numbers are safe to show.
            kind = type(error).__name__
            if isinstance(error, PermissionError) or "Credentials" in kind:
                raise PermissionError(kind) from None
            number = getattr(error, "status", None) or getattr(error, "errno", None)
            raise TransientError(f"{kind} {number}" if number else kind) from None


def _checked_answer(response: Any, start: int, end: int) -> RemoteFile:
    """What the head of an answer says of the file.

    Raises:
        OSError: As `Transport.fetch`.
    """
    status, tag = response.status, response.headers.get("ETag") or response.headers.get("Last-Modified") or ""
    if status in (404, 410):
        raise FileNotFoundError(str(status))
    if status in (401, 403, 407, 451):
        raise PermissionError(f"status {status}")
    if status == 416:
        raise ChangedError(f"it ends before byte {start}")
    if status in _TRANSIENT_STATUS:
        seconds = response.headers.get("Retry-After", "")
        raise TransientError(f"status {status}", float(seconds) if seconds.isdecimal() else 0.0)
    if status not in (200, 206):
        raise TransientError(f"unexpected status {status}")
    if response.headers.get("Content-Encoding", "identity") != "identity":
        raise TransientError("the server packs what it sends")
    if status == 200:
        if not (size := response.headers.get("Content-Length", "")).isdecimal():
            raise TransientError("the server does not say how large the file is")
        return RemoteFile(int(size), tag)
    span = re.fullmatch(r"bytes (\d+)-(\d+)/(\d+)", response.headers.get("Content-Range", ""))
    if span is None or (int(span[1]), int(span[2]) + 1) != (start, min(end, int(span[3]))):
        raise TransientError("the server answers with another range")
    return RemoteFile(int(span[3]), tag)


def _difference(expected: RemoteFile, found: RemoteFile) -> str:
    if expected.size != found.size:
        return f"{found.size} bytes, before {expected.size}"
    return f"its tag is {found.tag or 'gone'}, before {expected.tag or 'none'}"


def _innermost(error: BaseException) -> str:
    """The kind of what really happened; messages of urllib3 hold whole URLs."""
    while isinstance(reason := getattr(error, "reason", None), BaseException):
        error = reason
    cause = error.args[-1] if error.args and isinstance(error.args[-1], OSError) else error
    return type(cause).__name__
