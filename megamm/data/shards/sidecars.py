"""Remote shards and the local copies of their indexes: found, fetched, made and verified."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import xxhash

from megamm.config import Data, Reading
from megamm.core.errors import DataError
from megamm.core.files import atomic_file
from megamm.core.logging import get_logger
from megamm.data.media.files import ReadAt
from megamm.data.shards.arrays import map_arrays
from megamm.data.shards.fetching import Fetcher, changed
from megamm.data.shards.index import INDEX_VERSION, ShardIndex, build_index, build_index_from, index_path, load_index, write_index
from megamm.data.shards.places import RemoteShard, Shard, expand, has_magic, is_sidecar, is_url
from megamm.data.shards.reader import read_exactly
from megamm.data.shards.remote import RemoteReader

SIDECAR_FOLDER = "sidecars"
_NUM_FETCHERS = 16
_PIECE_BYTES = 8 << 20

_log = get_logger("data")


def sidecar_folder(root: Path, reading: Reading) -> Path:
    """Where the sidecars of remote shards lie."""
    return Path(reading.sidecars) if reading.sidecars else root / SIDECAR_FOLDER


def resolved_reading(data: Data) -> Reading:
    """A recipe's settings of reading, for who does not know its `data.root`."""
    return replace(data.reading, sidecars=str(sidecar_folder(Path(data.root), data.reading)))


def find_remote_shards(
    pattern: str, sidecars: Path, reading: Reading, on_index: Callable[[], None] | None = None
) -> tuple[RemoteShard, ...]:
    """The shards that a URL, brace range or glob names, sorted by URL; their indexes are fetched where they are missing here.

    Args:
        pattern: What names them.
        sidecars: Where the indexes go.
        reading: Settings of reading.
        on_index: Called after each index that was fetched.

    Raises:
        ConfigError: The pattern cannot be read.
        DataError: A shard or its index is missing, or an index is damaged or of another shard.
    """
    with closing(Fetcher(reading.timeout_seconds, reading.retries)) as fetcher:
        urls = {url for one in expand(pattern) for url in (_listed(one, fetcher) if has_magic(one) else (one,))}
        shards = tuple(RemoteShard.at(url, sidecars) for url in sorted(urls))
        fetch_indexes(shards, fetcher, on_index)
    return shards


def fetch_indexes(shards: Sequence[RemoteShard], fetcher: Fetcher, on_index: Callable[[], None] | None = None) -> None:
    """Bring the indexes that lie beside remote shards here, those that are not here yet; `on_index` is called after each.

    Raises:
        DataError: As `find_remote_shards`.
    """
    missing = [shard for shard in shards if not index_path(shard).exists()]
    if not missing:
        return
    _log.info("fetching the indexes of %d shards beside %s", len(missing), missing[0])
    with ThreadPoolExecutor(_NUM_FETCHERS) as pool:
        try:
            for _ in pool.map(lambda shard: _fetch_index(shard, fetcher), missing):
                if on_index:
                    on_index()
        except BaseException:
            # One missing shard must not be told after the indexes of all others.
            pool.shutdown(cancel_futures=True)
            raise


def index_shards(patterns: Sequence[str], sidecars: Path, reading: Reading) -> Iterator[tuple[Shard, ShardIndex]]:
    """Index local and remote shards, each streamed once; the sidecars of remote ones are written below `sidecars`.

    Args:
        patterns: Paths, URLs, brace ranges and globs.
        sidecars: For remote shards.
        reading: Settings of reading.

    Raises:
        ConfigError: A pattern cannot be read.
        DataError: A shard is missing or not a whole tar of samples.
    """
    with closing(RemoteReader(reading, against_index=False)) as reader:
        for shard in named_shards(patterns, sidecars, reading):
            if isinstance(shard, Path):
                yield shard, write_index(shard, build_index(shard))
            else:
                read = _reading_of(shard, reader)
                yield shard, write_index(shard, build_index_from(shard, read, reader.size(shard)))


def verify_shards(patterns: Sequence[str], sidecars: Path, reading: Reading) -> Iterator[tuple[Shard, ShardIndex]]:
    """Read shards whole and compare them with the digests of their indexes.

    Raises:
        ConfigError: A pattern cannot be read.
        DataError: A shard or an index is missing or damaged, or a shard changed.
    """
    # From the source, not from what a cache kept of it.
    with (
        closing(RemoteReader(reading, against_index=False)) as reader,
        closing(Fetcher(reading.timeout_seconds, reading.retries)) as fetcher,
    ):
        for shard in named_shards(patterns, sidecars, reading):
            if isinstance(shard, Path):
                yield shard, load_index(shard, verify_digest=True)
                continue
            fetch_indexes([shard], fetcher)
            index, digest = load_index(shard), xxhash.xxh3_128()
            read, size = _reading_of(shard, reader), reader.size(shard)
            for offset in range(0, size, _PIECE_BYTES):
                digest.update(read(offset, min(_PIECE_BYTES, size - offset)))
            if digest.hexdigest() != index.digest:
                raise changed(shard.url, f"digest {digest.hexdigest()}, indexed {index.digest}")
            yield shard, index


def named_shards(patterns: Sequence[str], sidecars: Path, reading: Reading) -> Iterator[Shard]:
    """The shards of a command line, whether indexed or not; a shell expands globs of local files.

    Raises:
        ConfigError: A pattern cannot be read.
        DataError: A glob of URLs misses a shard whose index is there.
    """
    with closing(Fetcher(reading.timeout_seconds, reading.retries)) as fetcher:
        for pattern in patterns:
            for one in expand(pattern):
                if not is_url(one):
                    yield Path(one)
                elif has_magic(one):
                    yield from (RemoteShard.at(url, sidecars) for url in _listed(one, fetcher))
                else:
                    yield RemoteShard.at(one, sidecars)


def _reading_of(shard: RemoteShard, reader: RemoteReader) -> ReadAt:
    return lambda offset, size: read_exactly(reader, shard, offset, size)


def _listed(pattern: str, fetcher: Fetcher) -> list[str]:
    """URLs of the shards that a glob names; one that is gone whose index is still there is missed."""
    urls = [url for url in fetcher.glob(pattern) if not is_sidecar(url.rpartition("/")[2])]
    indexed = [url.removesuffix(".index") for url in fetcher.glob(f"{pattern}.index")]
    if gone := sorted(set(indexed) - set(urls)):
        raise DataError(f"shard {gone[0]} does not exist, but its index does; bring it back or delete {gone[0]}.index")
    return urls


def _fetch_index(shard: RemoteShard, fetcher: Fetcher) -> None:
    url, fix = shard.beside(".index"), f"run `megamm data index {shard}`"
    expected = fetcher.find(url)
    size = fetcher.stat(shard.url).size
    if expected is None:
        raise DataError(f"shard {shard}: there is no {shard.name}.index beside it; {fix}, or put the index there")
    with atomic_file(index_path(shard)) as file:
        for start in range(0, expected.size, _PIECE_BYTES):
            file.write(fetcher.fetch(url, start, min(start + _PIECE_BYTES, expected.size), expected))
        file.flush()
        try:
            facts = map_arrays(Path(file.name)).facts
        except ValueError as error:
            raise DataError(f"shard {shard}: {shard.name}.index beside it is damaged ({error}); {fix}") from None
        if facts.get("version") != INDEX_VERSION:
            raise DataError(
                f"shard {shard}: {shard.name}.index beside it has version {facts.get('version')}, this is {INDEX_VERSION}; {fix}"
            )
        if facts["tar_size"] != size:
            raise changed(shard.url, f"{size} bytes, indexed {facts['tar_size']}")
