"""Reading remote shards: ranged requests in blocks, ahead of whoever reads in order, within bounded memory."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Iterator
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue

from megamm.config import Reading
from megamm.core.errors import DataError, MegaMMError
from megamm.core.logging import get_logger
from megamm.data.shards.cache import BlockCache
from megamm.data.shards.fetching import Fetcher, changed
from megamm.data.shards.index import index_path, read_shard_facts
from megamm.data.shards.places import RemoteShard, Shard
from megamm.data.shards.reader import LocalReader, Reader
from megamm.data.shards.transport import RemoteFile

_MAX_REQUEST_BLOCKS = 8
_NUM_AHEAD_THREADS = 4
_MAX_FILES = 16_384

_log = get_logger("data")


def open_reader(reading: Reading) -> Reader:
    """What reads the shards of a recipe, local and remote ones; nothing is opened or connected before the first read."""
    return _Router(reading)


class _Router:
    """Hands each shard to what can read it. Used from many threads."""

    def __init__(self, reading: Reading) -> None:
        self._local, self._remote = LocalReader(reading.max_open_files), RemoteReader(reading)

    def read(self, tar: Shard, offset: int, size: int) -> bytes:
        return self._of(tar).read(tar, offset, size)

    def distrust(self, tar: Shard, offset: int, size: int) -> None:
        self._of(tar).distrust(tar, offset, size)

    def close(self) -> None:
        self._local.close()
        self._remote.close()

    def _of(self, tar: Shard) -> Reader:
        return self._remote if isinstance(tar, RemoteShard) else self._local


@dataclass(slots=True)
class _File:
    """A shard as it was when it was first read here; `digest` is that of its index, empty where there is none yet."""

    expected: RemoteFile
    digest: str
    last_block: int = -1


class RemoteReader:
    """Blocks of remote shards. Used from many threads.

    State: blocks, whose bytes (asked for or there) stay below `buffer_bytes` except for what is being read itself, and for each
    shard the size and tag that its server said first. A block is fetched once however many threads want it. Every error is
    either gone after some tries or a DataError that names the shard: there are no short reads.
    """

    def __init__(self, reading: Reading, *, against_index: bool = True) -> None:
        """Nothing is connected before the first read.

        Args:
            reading: Settings.
            against_index: Compare shards with their indexes; False for who makes an index.
        """
        self._reading, self._against_index = reading, against_index
        self._request_blocks = max(1, min(_MAX_REQUEST_BLOCKS, reading.buffer_bytes // reading.block_bytes // 2))
        self._fetcher = Fetcher(reading.timeout_seconds, reading.retries)
        self._cache = BlockCache(Path(reading.cache_folder), reading.cache_bytes) if reading.cache_folder else None
        self._lock = threading.Lock()
        self._blocks: OrderedDict[tuple[RemoteShard, int], _Block] = OrderedDict()
        self._num_bytes = 0
        self._files: OrderedDict[RemoteShard, _File] = OrderedDict()
        self._ahead: SimpleQueue[_Work | None] = SimpleQueue()
        self._threads: list[threading.Thread] = []
        self._closed = False

    def read(self, tar: Shard, offset: int, size: int) -> bytes:
        """See `Reader.read`.

        Raises:
            ConfigError: The scheme of the shard's URL cannot be read.
            DataError: The shard is gone or changed, or its server refuses or failed again and again.
        """
        assert isinstance(tar, RemoteShard), "local shards are read by LocalReader"
        file = self._file(tar)
        end, block_bytes = min(offset + size, file.expected.size), self._reading.block_bytes
        pieces = []
        while offset < end:
            first = offset // block_bytes
            last = min((end - 1) // block_bytes, first + self._request_blocks - 1)
            for number, content in self._blocks_of(tar, file, first, last):
                start = number * block_bytes
                pieces.append(memoryview(content)[max(0, offset - start) : end - start])
            offset = (last + 1) * block_bytes
        return b"".join(pieces)

    def size(self, shard: RemoteShard) -> int:
        """Bytes of a shard.

        Raises:
            ConfigError: As `read`.
            DataError: As `read`.
        """
        return self._file(shard).expected.size

    def distrust(self, tar: Shard, offset: int, size: int) -> None:
        """See `Reader.distrust`: drops blocks from memory and cache, and asks the server whether the shard is still the same.

        Raises:
            ConfigError: As `read`.
            DataError: As `read`.
        """
        assert isinstance(tar, RemoteShard), "local shards are read by LocalReader"
        file = self._file(tar)
        if (found := self._fetcher.stat(tar.url)) != file.expected:
            raise changed(tar.url, f"{found.size} bytes with tag {found.tag}, first {file.expected.size} with {file.expected.tag}")
        for number in range(offset // self._reading.block_bytes, (offset + size - 1) // self._reading.block_bytes + 1):
            with self._lock:
                block = self._blocks.get((tar, number))
                if block is not None and block.future.done():
                    self._forget(tar, number)
            if self._cache is not None:
                self._cache.drop(self._cache_name(file, number))

    def close(self) -> None:
        """See `Reader.close`."""
        self._fetcher.close()
        with self._lock:
            self._closed = True
            # After all work: whoever waits for a block that was to be read ahead gets an error and does not wait for ever.
            for _ in self._threads:
                self._ahead.put(None)
            self._blocks.clear()
            self._files.clear()
            self._num_bytes = 0

    def _file(self, shard: RemoteShard) -> _File:
        """Size and tag of a shard, compared with its index once."""
        with self._lock:
            if (file := self._files.get(shard)) is not None:
                self._files.move_to_end(shard)
                return file
        facts = read_shard_facts(shard) if self._against_index and index_path(shard).exists() else None
        found = self._fetcher.stat(shard.url)
        if facts is not None and found.size != facts.tar_size:
            raise changed(shard.url, f"{found.size} bytes, indexed {facts.tar_size}")
        with self._lock:
            file = self._files.setdefault(shard, _File(found, "" if facts is None else facts.digest))
            if len(self._files) > _MAX_FILES:
                self._files.popitem(last=False)
            return file

    def _blocks_of(self, shard: RemoteShard, file: _File, first: int, last: int) -> Iterator[tuple[int, bytes]]:
        """Neighbouring blocks, those that are not there fetched by this thread in as few requests as possible."""
        with self._lock:
            if self._closed:
                raise DataError(f"shard {shard}: its reader was closed")
            wanted, missing = {}, {}
            for number in range(first, last + 1):
                if (block := self._blocks.get((shard, number))) is None:
                    wanted[number] = missing[number] = self._enter(shard, number, file)
                else:
                    self._blocks.move_to_end((shard, number))
                    wanted[number] = block.future
            self._read_ahead(shard, file, first, last)
        self._fill(_Work(shard, file, missing))
        for number, future in wanted.items():
            yield number, future.result()

    def _read_ahead(self, shard: RemoteShard, file: _File, first: int, last: int) -> None:
        """Have the blocks after `first` to `last` fetched in the background where reading goes in order; called with the lock held."""
        is_near, is_new = abs(first - file.last_block) <= 1, last > file.last_block
        file.last_block = max(file.last_block, last) if is_near else last
        num_blocks = -(-file.expected.size // self._reading.block_bytes)
        if not (is_near and is_new):
            return
        wanted = {}
        for number in range(last + 1, min(last + 1 + self._reading.read_ahead_blocks, num_blocks)):
            if (shard, number) not in self._blocks:
                if not self._has_room(self._reading.block_bytes):
                    break
                wanted[number] = self._enter(shard, number, file)
        if not wanted:
            return
        if not self._threads:
            self._threads = [threading.Thread(target=self._fetch_ahead, daemon=True, name="read-ahead") for _ in range(_NUM_AHEAD_THREADS)]
            for thread in self._threads:
                thread.start()
        self._ahead.put(_Work(shard, file, wanted))

    def _fetch_ahead(self) -> None:
        # Daemon threads: a server that does not answer must not hold up the end of the process.
        while (work := self._ahead.get()) is not None:
            try:
                self._fill(work)
            except MegaMMError as error:
                # Whoever comes to need these blocks asks again, and gets the error.
                _log.debug("reading ahead failed: %s", error)

    def _fill(self, work: _Work) -> None:
        """Get the blocks of `work` from cache or server; all of their futures end."""
        left = dict(work.blocks)
        try:
            for number, future in work.blocks.items():
                if (content := self._cached(work.file, number)) is not None:
                    del left[number]
                    future.set_result(content)
            for group in _neighbours(list(left)):
                for number, content in self._fetch(work, group):
                    left.pop(number).set_result(content)
        except BaseException as error:
            with self._lock:
                for number in left:
                    self._forget(work.shard, number)
            for future in left.values():
                future.set_exception(error if isinstance(error, MegaMMError) else DataError(f"shard {work.shard}: reading was cut off"))
            raise

    def _fetch(self, work: _Work, numbers: list[int]) -> Iterator[tuple[int, bytes]]:
        block_bytes = self._reading.block_bytes
        start = numbers[0] * block_bytes
        end = min((numbers[-1] + 1) * block_bytes, work.file.expected.size)
        content = memoryview(self._fetcher.fetch(work.shard.url, start, end, work.file.expected))
        for number in numbers:
            block = bytes(content[number * block_bytes - start : (number + 1) * block_bytes - start])
            if self._cache is not None and work.file.digest:
                self._cache.put(self._cache_name(work.file, number), block)
            yield number, block

    def _enter(self, shard: RemoteShard, number: int, file: _File) -> Future[bytes]:
        """Take the room of a block, even where there is none; called with the lock held."""
        size = min(self._reading.block_bytes, file.expected.size - number * self._reading.block_bytes)
        self._has_room(size)
        self._num_bytes += size
        block = self._blocks[shard, number] = _Block(Future(), size)
        return block.future

    def _has_room(self, size: int) -> bool:
        """Drop the oldest-used blocks until `size` more bytes fit, as far as blocks are there to drop; called with the lock held."""
        excess, dropped = self._num_bytes + size - self._reading.buffer_bytes, []
        for key, block in self._blocks.items():
            if excess <= 0:
                break
            if block.future.done():
                dropped.append(key)
                excess -= block.size
        for key in dropped:
            self._forget(*key)
        return excess <= 0

    def _forget(self, shard: RemoteShard, number: int) -> None:
        """Give back the room of a block; called with the lock held."""
        if (block := self._blocks.pop((shard, number), None)) is not None:
            self._num_bytes -= block.size

    def _cached(self, file: _File, number: int) -> bytes | None:
        return self._cache.get(self._cache_name(file, number)) if self._cache is not None and file.digest else None

    def _cache_name(self, file: _File, number: int) -> str:
        """By what the shard holds and not by where it lies: a replaced shard is never served from the cache, a mirror is."""
        return f"{file.digest}/{file.expected.size}/{self._reading.block_bytes}/{number}"


@dataclass(frozen=True, slots=True)
class _Block:
    """A block that is there or on its way."""

    future: Future[bytes]
    size: int


@dataclass(frozen=True, slots=True)
class _Work:
    """Blocks of a shard that one thread fetches."""

    shard: RemoteShard
    file: _File
    blocks: dict[int, Future[bytes]]


def _neighbours(numbers: list[int]) -> Iterator[list[int]]:
    """Runs of consecutive numbers."""
    run: list[int] = []
    for number in numbers:
        if run and number != run[-1] + 1:
            yield run
            run = []
        run.append(number)
    if run:
        yield run
