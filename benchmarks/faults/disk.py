"""A disk that is full while something is written: index and lengths, a new shard, the cache of remote blocks.

The kernel refuses to let files grow beyond a limit, which fails writes where a full disk does, half-way through them included.
"""

from __future__ import annotations

import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from benchmarks.faults.case import Case
from benchmarks.faults.corpus import healthy, pack
from benchmarks.faults.serving import Manners
from benchmarks.faults.truth import RULES, load_tokenizer
from megamm.config import Reading
from megamm.data.samples.lengths import ensure_lengths
from megamm.data.shards.index import index_path, write_index
from megamm.prepare.writer import ShardFile


def sidecars(canary: Path) -> Iterator[Case]:
    """Index and lengths are written anew on a full disk; what was there must stay whole or be gone."""
    for num_bytes in range(0, 3000, 50):
        yield Case(
            f"{num_bytes} bytes", pack(healthy()), healthy(), spoil=lambda tar, limit=num_bytes: _index_again(tar, limit), passes=True
        )


def shards(canary: Path) -> Iterator[Case]:
    """A shard is written on a full disk over one that is there."""
    for num_bytes in range(0, 12_000, 400):
        yield Case(
            f"{num_bytes} bytes", pack(healthy()), healthy(), spoil=lambda tar, limit=num_bytes: _write_again(tar, limit), passes=True
        )


def cache(canary: Path) -> Iterator[Case]:
    """Remote blocks cannot be kept: they are delivered all the same."""
    for num_bytes in (0, 100, 1000, 4096, 5000):
        yield Case(
            f"{num_bytes} bytes",
            pack(healthy()),
            healthy(),
            server=Manners("status", times=0),
            settings={"reading": Reading(block_bytes=4096, timeout_seconds=5.0, cache_folder=str(canary.with_name("cache")))},
            around=lambda limit=num_bytes: _full_disk(limit),
            passes=True,
        )


@contextmanager
def _full_disk(num_bytes: int) -> Iterator[None]:
    """No file of this process grows beyond `num_bytes`."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def _index_again(tar: Path, limit: int) -> None:
    index_path(tar).unlink()
    try:
        with _full_disk(limit):
            write_index(tar)
            ensure_lengths([tar], load_tokenizer(), RULES)
    finally:
        _check_no_rest(tar.parent)


def _write_again(tar: Path, limit: int) -> None:
    try:
        with _full_disk(limit), ShardFile(tar) as shard:
            for key, files in healthy().items():
                shard.add(key, files)
    finally:
        _check_no_rest(tar.parent)


def _check_no_rest(folder: Path) -> None:
    if rest := sorted(path.name for path in folder.iterdir() if path.name.startswith(".")):
        raise RuntimeError(f"{rest} stayed behind")
