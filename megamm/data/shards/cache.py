"""A cache of remote blocks on the node's own disk, shared by all processes of the node.

One file a block and not one a shard: training reads samples from everywhere, and a first step that waits for whole shards
would wait for hours, while the cache would fill with bytes that nobody asked for.
"""

from __future__ import annotations

import fcntl
import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import xxhash

from megamm.core.files import digest_text
from megamm.core.logging import get_logger

_DIGEST_BYTES = 16
_LOCK_SECONDS = 0.2
_FULL_SHARE = 0.9

_log = get_logger("data")


class BlockCache:
    """Blocks by name. Safe for many threads and processes; what is read from it is what was put, or nothing.

    State: the folder's files. Each holds a digest over its name and bytes, checked at every read, so that a write which was
    cut off, a flipped bit or a renamed file is dropped and fetched again; that is why nothing is synced. Writers take a lock,
    which the kernel frees when a process dies; readers take none, because a rename shows them whole files only. The bound
    counts the bytes of blocks and of temporary files; the oldest-used blocks go first.
    """

    def __init__(self, folder: Path, max_bytes: int) -> None:
        """Use `folder`, which nothing else should write to, for at most `max_bytes`."""
        self._folder, self._max_bytes = folder, max_bytes
        self._can_write = True
        # flock knows processes, not threads.
        self._lock = threading.Lock()

    def get(self, name: str) -> bytes | None:
        """The bytes that were put under `name`; None where there are none, or not the same any more."""
        path = self._path(name)
        try:
            content = path.read_bytes()
        except OSError:
            return None
        if content[:_DIGEST_BYTES] != _digest(name, memoryview(content)[_DIGEST_BYTES:]):
            _log.warning("cache: a block in %s is damaged; it is fetched again", self._folder)
            self.drop(name)
            return None
        self._touch(path)
        return content[_DIGEST_BYTES:]

    def put(self, name: str, content: bytes) -> None:
        """Keep `content`, dropping the oldest-used blocks where room is needed.

        Where the disk is full or refuses, that is warned of once, and this process writes no more.
        """
        size = _DIGEST_BYTES + len(content)
        if not self._can_write or size > self._max_bytes:
            return
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            with self._locked() as count:
                # Another process may be making room for a while: going on is better than waiting.
                if count is not None:
                    self._write(count, name, content, size)
        except OSError as error:
            if self._can_write:
                self._can_write = False
                _log.warning(
                    "cache: writing to %s failed (%s); reading goes on without keeping more", self._folder, error.strerror or error
                )

    def drop(self, name: str) -> None:
        """Forget a block."""
        # Its bytes stay counted until room is needed, when all is counted anew.
        self._path(name).unlink(missing_ok=True)

    def _write(self, count: int, name: str, content: bytes, size: int) -> None:
        path = self._path(name)
        if path.exists():
            return
        used = _read_count(count)
        if used is None or used + size > self._max_bytes:
            used = self._make_room(size)
        # Before the write: a process that dies in between leaves too much counted, never too little.
        _write_count(count, used + size)
        temporary = path.with_suffix(".tmp")
        path.parent.mkdir(exist_ok=True)
        try:
            with temporary.open("wb") as file:
                file.write(_digest(name, content))
                file.write(content)
            temporary.replace(path)
        except OSError:
            temporary.unlink(missing_ok=True)
            raise

    def _make_room(self, size: int) -> int:
        """Delete what dead writers left, then the oldest-used blocks; returns the bytes that stay."""
        entries = []
        for folder in os.scandir(self._folder):
            if folder.is_dir(follow_symlinks=False):
                for entry in os.scandir(folder.path):
                    # Who finds a block damaged drops it without the lock.
                    with suppress(FileNotFoundError):
                        entries.append((entry, entry.stat(follow_symlinks=False)))
        used = sum(status.st_size for _, status in entries)
        # Some at once, or every block from here on would count the whole folder.
        wanted = min(self._max_bytes - size, int(self._max_bytes * _FULL_SHARE))
        for entry, status in sorted(entries, key=lambda pair: (not pair[0].name.endswith(".tmp"), pair[1].st_mtime_ns)):
            if used <= wanted and not entry.name.endswith(".tmp"):
                break
            Path(entry.path).unlink(missing_ok=True)
            used -= status.st_size
        return used

    @contextmanager
    def _locked(self) -> Iterator[int | None]:
        """The descriptor of the count of used bytes, locked; None where that takes too long."""
        deadline = time.monotonic() + _LOCK_SECONDS
        if not self._lock.acquire(timeout=_LOCK_SECONDS):
            yield None
            return
        try:
            descriptor = os.open(self._folder / "used_bytes", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
            try:
                yield descriptor if _take(descriptor, deadline) else None
            finally:
                os.close(descriptor)
        finally:
            self._lock.release()

    def _touch(self, path: Path) -> None:
        try:
            os.utime(path)
        except OSError:
            # Dropped meanwhile, or another user's: the order of use is only a hint.
            return

    def _path(self, name: str) -> Path:
        digest = digest_text(name)
        return self._folder / digest[:2] / f"{digest[2:]}.block"


def _take(descriptor: int, deadline: float) -> bool:
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            if time.monotonic() > deadline:
                return False
            time.sleep(0.005)


def _read_count(descriptor: int) -> int | None:
    text = os.pread(descriptor, 32, 0)
    return int(text) if text.strip().isdigit() else None


def _write_count(descriptor: int, num_bytes: int) -> None:
    # Always as long as before, so that no part of an older number stays.
    os.pwrite(descriptor, b"%020d\n" % num_bytes, 0)


def _digest(name: str, content: bytes | memoryview) -> bytes:
    state = xxhash.xxh3_128(name.encode())
    state.update(content)
    return state.digest()
