"""Which samples are kept out: keys that somebody named, as places in the datasets, so that planning need not look up a key."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

import numpy as np
import xxhash

from megamm.data.planning.state import Exclusion
from megamm.data.samples.datasets import ShardSet
from megamm.data.shards.index import load_index


def excluded_samples(exclusions: Iterable[Exclusion], datasets: Mapping[str, ShardSet]) -> frozenset[tuple[str, int]]:
    """Dataset and index of every sample that is kept out; all of them where shards of a dataset share a key.

    Opens each index of the datasets that have exclusions once, and no other. Keys that no sample has, as after an accepted
    change of the data, keep nothing out.

    Args:
        exclusions: Of the state.
        datasets: The training datasets by name.

    Raises:
        DataError: A shard or an index is missing, damaged or changed.
    """
    keys: dict[str, set[str]] = {}
    for name in (name for exclusion in exclusions for name in exclusion.keys):
        dataset, _, key = name.partition("/")
        keys.setdefault(dataset, set()).add(key)
    return frozenset((name, index) for name, own in keys.items() if name in datasets for index in _found(own, datasets[name]))


def _found(keys: set[str], dataset: ShardSet) -> Iterator[int]:
    """Indices of the samples with one of the keys: by their hashes first, the key itself where one matches."""
    hashes = np.array([xxhash.xxh3_64_intdigest(key.encode()) for key in keys], dtype=np.uint64)
    for tar, start in zip(dataset.tars, dataset.starts.tolist(), strict=False):
        index = load_index(tar)
        yield from (start + number for number in np.flatnonzero(np.isin(index.key_digests, hashes)).tolist() if index.key(number) in keys)
