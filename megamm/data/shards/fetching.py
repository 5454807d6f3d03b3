"""Requests to servers that are tried again as long as their errors may pass, and then fail loudly."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable
from typing import TypeVar
from urllib.parse import urlsplit

from megamm.core.errors import DataError, UnreachableData
from megamm.core.logging import get_logger
from megamm.data.shards.places import public_url
from megamm.data.shards.transport import ChangedError, FsspecTransport, NoRangesError, RemoteFile, TransientError, Transport, open_transport

_FIRST_DELAY_SECONDS = 0.5
_LONGEST_DELAY_SECONDS = 30.0

_log = get_logger("data")
_Result = TypeVar("_Result")


class Fetcher:
    """Files behind URLs. Used from many threads; keeps connections and nothing else."""

    def __init__(self, timeout_seconds: float, retries: int) -> None:
        """Settings are those of `data.reading`; nothing is connected before the first request."""
        self._timeout_seconds, self._retries = timeout_seconds, retries
        self._transports: dict[tuple[str, str], Transport] = {}
        self._lock = threading.Lock()
        self._closed = threading.Event()
        # Not the module's: trainers seed that one, and ranks with equal delays would come back together.
        self._random = random.Random()

    def find(self, url: str) -> RemoteFile | None:
        """Size and tag of a file; None where there is none.

        Raises:
            ConfigError: The scheme cannot be read.
            DataError: The server refuses, or failed again and again.
        """
        try:
            return self._patiently(url, "asking for its size", lambda transport: transport.stat(url))
        except FileNotFoundError:
            return None

    def stat(self, url: str) -> RemoteFile:
        """Size and tag of a file that is there.

        Raises:
            ConfigError: As `find`.
            DataError: As `find`, or there is no such file.
        """
        if (found := self.find(url)) is None:
            raise DataError(f"shard {public_url(url)} does not exist; check its URL, or bring it back")
        return found

    def fetch(self, url: str, start: int, end: int, expected: RemoteFile) -> bytes:
        """Exactly the bytes from `start` to `end` of the expected file.

        Raises:
            ConfigError: As `find`.
            DataError: The file is gone or changed, or the server refuses, sends no ranges, or failed again and again.
        """
        try:
            return self._patiently(url, f"reading bytes {start} to {end}", lambda transport: transport.fetch(url, start, end, expected))
        except FileNotFoundError:
            raise DataError(f"shard {public_url(url)} does not exist any more; bring it back") from None
        except ChangedError as error:
            raise changed(url, str(error)) from None
        except NoRangesError:
            raise DataError(
                f"shard {public_url(url)}: its server sends whole files only; use one that supports range requests, as nginx and object "
                "stores do, or copy the shards to disk"
            ) from None

    def glob(self, url: str) -> list[str]:
        """URLs that a glob names, sorted.

        Raises:
            ConfigError: As `find`.
            DataError: As `find`.
        """

        def list_(transport: Transport) -> list[str]:
            assert isinstance(transport, FsspecTransport), "globs of web servers are refused by `shards.expand`"
            return transport.glob(url)

        try:
            return self._patiently(url, "listing", list_)
        except FileNotFoundError:
            return []

    def close(self) -> None:
        """End waiting threads and drop connections."""
        self._closed.set()
        with self._lock:
            for transport in self._transports.values():
                transport.close()
            self._transports.clear()

    def _patiently(self, url: str, what: str, request: Callable[[Transport], _Result]) -> _Result:
        delay = _FIRST_DELAY_SECONDS
        for num_left in range(self._retries, -1, -1):
            if self._closed.is_set():
                raise DataError(f"shard {public_url(url)}: its reader was closed")
            try:
                return request(self._transport(url))
            except PermissionError as error:
                raise DataError(f"shard {public_url(url)}: access is refused ({error}); check the credentials in the environment") from None
            except TransientError as error:
                if not num_left:
                    raise UnreachableData(
                        f"shard {public_url(url)}: {what} failed {self._retries + 1} times ({error}); check the server and the network"
                    ) from None
                wait = min(max(delay * self._random.uniform(0.5, 1.0), error.wait_seconds), _LONGEST_DELAY_SECONDS)
                _log.warning("shard %s: %s failed (%s), trying again in %.1f s", public_url(url), what, error, wait)
                self._closed.wait(wait)
                delay *= 2
        raise AssertionError("the last try returns or raises")

    def _transport(self, url: str) -> Transport:
        parts = urlsplit(url)
        # One client serves all web servers; fsspec's file systems may belong to one host or bucket.
        key = ("http", "") if parts.scheme in ("http", "https") else (parts.scheme, parts.netloc)
        with self._lock:
            if key not in self._transports:
                self._transports[key] = open_transport(url, self._timeout_seconds)
            return self._transports[key]


def changed(url: str, difference: str) -> DataError:
    """The error of a remote shard that is not the indexed one any more."""
    shown = public_url(url)
    return DataError(f"shard {shown} changed since it was indexed: {difference}; run `megamm data index {shown}`")
