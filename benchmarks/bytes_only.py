"""What reading costs before anything is decoded: processor time from page cache to checked bytes of a sample."""

from __future__ import annotations

import gc
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path

import numpy as np

from benchmarks.corpus import Corpus
from benchmarks.results import Row, measured
from megamm.config import Data
from megamm.data.planning.order import sample_at
from megamm.data.shards.index import Member
from megamm.data.shards.reader import LocalReader, ShardPool


def bytes_only_rows(corpus: Corpus, *, num_rounds: int) -> list[Row]:
    """Index reader against plain positioned reads and against webdataset, one after the other in every round."""
    import webdataset

    plan = corpus.plan()
    (dataset,) = plan.datasets.values()
    pool = ShardPool(LocalReader())
    places = [dataset.locate(number) for number in _shuffled(corpus)]
    ranges = [_range(pool.shard(tar).index.members(number)) for tar, number in places]

    def read_ours() -> int:
        return sum(len(pool.shard(tar).sample(number)) > 0 for tar, number in places)

    def read_webdataset() -> int:
        urls = [str(tar) for tar in corpus.tars]
        return sum(1 for _ in webdataset.WebDataset(urls, shardshuffle=False))

    with _descriptors(corpus.tars) as files:

        def read_raw() -> int:
            spans = zip(places, ranges, strict=True)
            return sum(len(os.pread(files[tar], size, offset)) == size for (tar, _), (offset, size) in spans)

        readers = {"raw": read_raw, "ours": read_ours, "webdataset": read_webdataset}
        for reader in readers.values():
            _cpu_seconds(reader, corpus.num_samples)  # the page cache, imports and maps
        rounds = [{name: _cpu_seconds(reader, corpus.num_samples) for name, reader in readers.items()} for _ in range(num_rounds)]
    pool.close()
    raw, ours, peer = ([one[name] / corpus.num_samples * 1e3 for one in rounds] for name in readers)
    label = f"webdataset {metadata.version('webdataset')}, sequential, up to grouped bytes, nothing checked"
    return [
        measured("bytes only: plain reads", raw, "CPU ms a sample", peer="pread of the same ranges in the same order"),
        measured("bytes only: index reader", ours, "CPU ms a sample", peer="shuffled, every member's hash checked"),
        measured("bytes only: webdataset", peer, "CPU ms a sample", peer=label),
        measured("bytes only: index reader / plain reads", _ratios(ours, raw), "×", goal="<= 1.6", peer="plain reads"),
        measured("bytes only: webdataset / index reader", _ratios(peer, ours), "×", goal=">= 4", peer=label),
    ]


def _shuffled(corpus: Corpus) -> list[int]:
    """All samples in the loader's default order."""
    settings = Data()
    order = sample_at(
        np.arange(corpus.num_samples),
        num_samples=corpus.num_samples,
        block=settings.shuffle_block,
        window=settings.shuffle_window,
        seed=0,
        epoch=0,
    )
    return order.tolist()


def _range(members: list[Member]) -> tuple[int, int]:
    return members[0].offset, members[-1].offset + members[-1].size - members[0].offset


@contextmanager
def _descriptors(tars: list[Path]) -> Iterator[dict[Path, int]]:
    files = {tar: os.open(tar, os.O_RDONLY) for tar in tars}
    try:
        yield files
    finally:
        for descriptor in files.values():
            os.close(descriptor)


def _cpu_seconds(read: Callable[[], int], num_samples: int) -> float:
    gc.collect()
    started = time.process_time()
    found = read()
    spent = time.process_time() - started
    assert found == num_samples, f"{found} of {num_samples} samples were read"
    return spent


def _ratios(above: list[float], below: list[float]) -> list[float]:
    return [one / other for one, other in zip(above, below, strict=True)]
