"""Reading samples by position, every byte checked against the index."""

from __future__ import annotations

import os
import threading
import time
from collections import OrderedDict
from collections.abc import Collection
from pathlib import Path
from typing import BinaryIO, NamedTuple, Protocol

import xxhash

from megamm.core.errors import DataError, UnreachableData
from megamm.core.logging import get_logger
from megamm.data.ledger import BadSample
from megamm.data.shards.index import Member, ShardIndex, load_index
from megamm.data.shards.places import Shard
from megamm.data.shards.tar import BLOCK_BYTES

_RETRY_DELAYS_SECONDS = (0.1, 1.0, 5.0)
_MAX_IDENTITIES = 16_384

_log = get_logger("data")


class Reader(Protocol):
    """Where the bytes of shards come from. Used from many threads."""

    def read(self, tar: Shard, offset: int, size: int) -> bytes:
        """Bytes of a shard; fewer than `size` where the shard ends.

        Raises:
            OSError: The read failed; it is tried again unless the shard is not there.
            DataError: Trying again has no use.
        """
        ...

    def distrust(self, tar: Shard, offset: int, size: int) -> None:
        """Forget what was kept of these bytes, which are not the indexed ones: the next read goes to the source.

        Raises:
            DataError: The shard is another one than it was.
        """
        ...

    def close(self) -> None:
        """Release what is open."""
        ...


class _Identity(NamedTuple):
    """What tells a file from another one under its name, and from itself after it was written to."""

    device: int
    inode: int
    num_bytes: int
    modified_ns: int


class LocalReader:
    """Positioned reads from local and parallel file systems, over a bounded set of open files."""

    def __init__(self, max_open_files: int = 128) -> None:
        self._max_open_files = max_open_files
        self._files: OrderedDict[Shard, BinaryIO] = OrderedDict()
        # Of files when they were first opened; they are closed and opened anew, also under other content.
        self._identities: OrderedDict[Shard, _Identity] = OrderedDict()
        self._lock = threading.Lock()

    def read(self, tar: Shard, offset: int, size: int) -> bytes:
        """See `Reader.read`."""
        # The local reference keeps the file open while another thread evicts it.
        file = self._open(tar)
        try:
            content = os.pread(file.fileno(), size, offset)
            while len(content) < size and (more := os.pread(file.fileno(), size - len(content), offset + len(content))):
                content += more
        except OSError:
            # A descriptor that a network file system calls stale stays so: the next try opens the file anew.
            self._drop(tar)
            raise
        return content

    def distrust(self, tar: Shard, offset: int, size: int) -> None:
        """See `Reader.distrust`: the file is opened anew, on which a network file system looks at its server again.

        A file that is still the one that was first opened has bad bytes, which is said of the sample. Any other file was put in
        its place or written to, and none of its samples is the indexed one.
        """
        self._drop(tar)
        try:
            found = _identity(self._open(tar))
        except OSError:
            # The next read says so, after some tries.
            return
        with self._lock:
            first = self._identities.get(tar, found)
        if found != first:
            raise DataError(f"shard {tar} was replaced or modified while it was read; bring it back, or run `megamm data index {tar}`")

    def close(self) -> None:
        """See `Reader.close`."""
        with self._lock:
            self._files.clear()
            self._identities.clear()

    def _drop(self, tar: Shard) -> None:
        with self._lock:
            self._files.pop(tar, None)

    def _open(self, tar: Shard) -> BinaryIO:
        assert isinstance(tar, Path), "remote shards are read by RemoteReader"
        with self._lock:
            file = self._files.get(tar)
            if file is None:
                file = self._files[tar] = tar.open("rb", buffering=0)  # type: ignore[assignment]
                if len(self._files) > self._max_open_files:
                    self._files.popitem(last=False)
                self._identities.setdefault(tar, _identity(file))
                self._identities.move_to_end(tar)
                if len(self._identities) > _MAX_IDENTITIES:
                    self._identities.popitem(last=False)
            else:
                self._files.move_to_end(tar)
            return file


def _identity(file: BinaryIO) -> _Identity:
    status = os.fstat(file.fileno())
    return _Identity(status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns)


class ShardReader:
    """The samples of one shard. Safe to use from many threads.

    Attributes:
        tar: The shard.
        index: Its index.
    """

    def __init__(self, tar: Shard, index: ShardIndex, reader: Reader) -> None:
        self.tar, self.index, self._reader = tar, index, reader

    def sample(self, number: int, suffixes: Collection[str] | None = None) -> dict[str, bytes]:
        """Members of a sample by suffix, in one read from the first of them to the last.

        Args:
            number: Which sample.
            suffixes: Which members; None for all. Those that it does not have are left out.

        Raises:
            BadSample: Bytes differ from what was indexed.
            DataError: The shard cannot be read or became shorter.
        """
        members = [member for member in self.index.members(number) if suffixes is None or member.suffix in suffixes]
        return self._read(number, members) if members else {}

    def _read(self, number: int, members: list[Member]) -> dict[str, bytes]:
        start, end = members[0].offset - BLOCK_BYTES, members[-1].offset + members[-1].size
        files, changed = self._members(start, end, members)
        if changed:
            # Bytes can change on their way or in a cache; only what the source says twice is said of the sample.
            self._reader.distrust(self.tar, start, end - start)
            files, changed = self._members(start, end, members)
        if changed:
            raise BadSample(f"the bytes of {self.index.key(number)}.{changed} changed since they were indexed")
        return files

    def _members(self, start: int, end: int, members: list[Member]) -> tuple[dict[str, bytes], str]:
        """Bytes by suffix, and the first suffix whose bytes are not the indexed ones (empty for none)."""
        content = read_exactly(self._reader, self.tar, start, end - start)
        files, view = {}, memoryview(content)
        for member in members:
            offset = member.offset - start
            if xxhash.xxh3_64_intdigest(view[offset - BLOCK_BYTES : offset + member.size]) != member.digest:
                return {}, member.suffix
            files[member.suffix] = content[offset : offset + member.size]
        return files, ""


class ShardPool:
    """Readers of many shards; the indexes of the most recently used ones stay mapped (each map holds a file descriptor)."""

    def __init__(self, reader: Reader, max_mapped: int = 256) -> None:
        self._reader, self._max_mapped = reader, max_mapped
        self._shards: OrderedDict[Shard, ShardReader] = OrderedDict()
        self._lock = threading.Lock()

    def shard(self, tar: Shard) -> ShardReader:
        """The reader of a shard.

        Raises:
            DataError: Shard or index is missing, damaged or changed.
        """
        with self._lock:
            if (shard := self._shards.get(tar)) is not None:
                self._shards.move_to_end(tar)
                return shard
        # Outside the lock: two threads may map the same index at once, which is only a little work twice.
        shard = ShardReader(tar, load_index(tar), self._reader)
        with self._lock:
            self._shards[tar] = shard
            if len(self._shards) > self._max_mapped:
                self._shards.popitem(last=False)
        return shard

    def opened(self, tar: Shard) -> ShardReader | None:
        """The reader of a shard whose index is mapped already; opens nothing, so it answers where the storage does not."""
        return self._shards.get(tar)

    def close(self) -> None:
        """Release files and maps."""
        with self._lock:
            self._shards.clear()
        self._reader.close()


def read_exactly(reader: Reader, tar: Shard, offset: int, size: int) -> bytes:
    """Read `size` bytes, trying again after errors that may pass.

    Raises:
        DataError: The shard is missing, became shorter, or reading kept failing; never a reason to skip a sample.
    """
    content = _read_patiently(reader, tar, offset, size)
    if len(content) < size:
        raise DataError(
            f"shard {tar} changed since it was indexed: {len(content)} of {size} bytes at {offset}; run `megamm data index {tar}`"
        )
    return content


def _read_patiently(reader: Reader, tar: Shard, offset: int, size: int) -> bytes:
    delays = list(_RETRY_DELAYS_SECONDS)
    while True:
        try:
            return reader.read(tar, offset, size)
        except FileNotFoundError:
            raise DataError(f"shard {tar} does not exist any more; bring it back") from None
        except OSError as error:
            if not delays:
                raise UnreachableData(f"shard {tar}: reading failed again and again ({error}); check the file system") from error
            _log.warning("reading %s failed (%s), trying again in %.1f s", tar, error, delays[0])
            time.sleep(delays.pop(0))
