"""Readers that fail: ours through the loader's own `reader`, the peer's through a stream."""

from __future__ import annotations

import errno
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from benchmarks.faults.case import Case
from benchmarks.faults.corpus import healthy, pack
from megamm.data.shards.reader import LocalReader

SCHEME = "faulty"


@dataclass(frozen=True)
class Trouble:
    """What goes wrong while reading.

    Attributes:
        kind: An error is raised, fewer bytes than there are come back, other bytes come back, or nothing comes for `seconds`.
        first: Reads that go well before it.
        times: Reads that it strikes.
        seconds: Length of a stall.
        code: Of the error.
    """

    kind: Literal["error", "short", "wrong", "stall"]
    first: int = 0
    times: int = 1
    seconds: float = 0.0
    code: int = errno.EIO

    def strike(self, number: int, content: bytes) -> bytes:
        """What read `number` returns in place of `content`."""
        if not self.first <= number < self.first + self.times:
            return content
        if self.kind == "error":
            raise OSError(self.code, "injected")
        if self.kind == "stall":
            time.sleep(self.seconds)
            return content
        half = len(content) // 2
        return content[:half] if self.kind == "short" else content[:half] + bytes(len(content) - half)


class FaultyReader(LocalReader):
    """Local files whose reads are in trouble."""

    def __init__(self, trouble: Trouble) -> None:
        super().__init__()
        self._trouble, self._number = trouble, 0
        self._count = threading.Lock()

    def read(self, tar: Any, offset: int, size: int) -> bytes:
        """See `Reader.read`."""
        content = super().read(tar, offset, size)
        with self._count:
            number, self._number = self._number, self._number + 1
        return self._trouble.strike(number, content)


def faulty_reader(trouble: Any) -> FaultyReader | None:
    """A reader in trouble; None for None."""
    return None if trouble is None else FaultyReader(trouble)


class _FaultyStream:
    """A file whose reads are in trouble; webdataset reads it in blocks."""

    def __init__(self, tar: Path, trouble: Trouble) -> None:
        self._file, self._trouble, self._number = tar.open("rb"), trouble, 0

    def read(self, size: int = -1) -> bytes:
        content = self._file.read(size)
        self._number += 1
        return self._trouble.strike(self._number - 1, content)

    def close(self) -> None:
        self._file.close()


def faulty_stream(tar: Path, trouble: Any) -> str:
    """A URL under which webdataset reads `tar` in trouble."""
    from webdataset.gopen import gopen_schemes

    gopen_schemes[SCHEME] = lambda url, mode, bufsize, **options: _FaultyStream(tar, trouble)
    return f"{SCHEME}:{tar}"


def errors_once(canary: Path) -> Iterator[Case]:
    """One read fails, with any of the errors that pass."""
    for first, code in ((0, errno.EIO), (1, errno.EAGAIN), (2, errno.ESTALE), (3, errno.ETIMEDOUT)):
        yield _case(f"read {first}, {errno.errorcode[code]}", Trouble("error", first=first, code=code), passes=True)


def errors_always(canary: Path) -> Iterator[Case]:
    """Every read fails from some point on."""
    for first in (0, 3):
        yield _case(f"from read {first} on", Trouble("error", first=first, times=1 << 30))


def short_reads(canary: Path) -> Iterator[Case]:
    """Fewer bytes come back than there are, once or always."""
    for first in range(4):
        yield _case(f"read {first}", Trouble("short", first=first))
        yield _case(f"from read {first} on", Trouble("short", first=first, times=1 << 30))


def wrong_reads(canary: Path) -> Iterator[Case]:
    """Other bytes come back, once or always."""
    for first in range(4):
        yield _case(f"read {first}", Trouble("wrong", first=first))
        yield _case(f"from read {first} on", Trouble("wrong", first=first, times=1 << 30))


def short_stall(canary: Path) -> Iterator[Case]:
    """A read that takes two seconds."""
    yield _case("read 1", Trouble("stall", first=1, seconds=2.0), passes=True)


def long_stall(canary: Path) -> Iterator[Case]:
    """A read that takes a minute."""
    yield _case("read 1", Trouble("stall", first=1, seconds=60.0), passes=True)


def _case(name: str, trouble: Trouble, *, passes: bool = False) -> Case:
    return Case(name, pack(healthy()), healthy(), trouble=trouble, passes=passes)
