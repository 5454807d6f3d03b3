"""Small files beside shards that belong to no sample."""

from __future__ import annotations

from contextlib import closing
from urllib.parse import urlsplit

from megamm.config import Reading
from megamm.core.errors import DataError
from megamm.data.shards.fetching import Fetcher
from megamm.data.shards.places import RemoteShard, Shard

_MAX_BYTES = 1 << 30


def read_beside(shard: Shard, name: str, reading: Reading) -> bytes | None:
    """Content of a file in the folder of a local or remote shard; None where there is none.

    Args:
        shard: A shard that is there.
        name: The file's name.
        reading: How remote files are read.

    Raises:
        DataError: The file cannot be read, or is larger than anything that should lie there.
    """
    if not isinstance(shard, RemoteShard):
        path = shard.with_name(name)
        try:
            return path.read_bytes()
        except FileNotFoundError:
            return None
        except OSError as error:
            raise DataError(f"{path} cannot be read ({error.strerror}); make it readable") from error
    parts = urlsplit(shard.url)
    url = parts._replace(path=f"{parts.path.rpartition('/')[0]}/{name}").geturl()
    with closing(Fetcher(reading.timeout_seconds, reading.retries)) as fetcher:
        found = fetcher.find(url)
        if found is None:
            return None
        if found.size > _MAX_BYTES:
            raise DataError(f"{name} beside shard {shard} has {found.size} bytes, more than {_MAX_BYTES}; is it the right file?")
        return fetcher.fetch(url, 0, found.size, found) if found.size else b""
