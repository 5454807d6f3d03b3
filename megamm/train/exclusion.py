"""Samples that somebody keeps out: the file that names them, checked against the data before anything goes on."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import xxhash

from megamm.core.errors import ConfigError
from megamm.core.names import did_you_mean
from megamm.data.samples.datasets import ShardSet
from megamm.data.shards.index import load_index

_MAX_COMPARED_KEYS = 20_000


def read_keys(path: Path) -> list[str]:
    """The sample keys of a file: one `dataset/key` a line; empty lines and those that start with `#` are left out.

    Returns:
        Sorted, each once.

    Raises:
        ConfigError: The file is not there, is not UTF-8, names no sample, or a line is not `dataset/key`.
    """
    try:
        # From bytes: reading text would make ends of lines out of what may be part of a key, as `str.splitlines` does.
        text = path.read_bytes().decode("utf-8-sig")
    except FileNotFoundError:
        raise ConfigError(f"--exclude {path} does not exist; name a file with one dataset/key a line") from None
    except IsADirectoryError:
        raise ConfigError(f"--exclude {path} is a folder; name a file with one dataset/key a line") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"--exclude {path} is not UTF-8 ({error.reason} at byte {error.start}); save it as UTF-8") from None
    keys = set()
    for number, line in enumerate(text.split("\n"), start=1):
        name = line.strip(" \t\r")
        if not name or name.startswith("#"):
            continue
        dataset, slash, key = name.partition("/")
        if not (dataset and slash and key):
            raise ConfigError(f"--exclude {path}: line {number}, {name!r}, is not dataset/key, such as digits/train_00012")
        keys.add(name)
    if not keys:
        raise ConfigError(f"--exclude {path} names no sample; write one dataset/key a line, or drop the argument")
    return sorted(keys)


def check_known(keys: Sequence[str], datasets: Mapping[str, ShardSet]) -> None:
    """Refuse keys that no training sample has: a typing error would keep nothing out and never be noticed.

    Args:
        keys: `dataset/key` each.
        datasets: The training datasets by name.

    Raises:
        ConfigError: A dataset or a key is not there; names the nearest one.
    """
    wanted: dict[str, list[str]] = {}
    for name in keys:
        dataset, _, key = name.partition("/")
        wanted.setdefault(dataset, []).append(key)
    for dataset, own in wanted.items():
        if dataset not in datasets:
            hint, known = did_you_mean(dataset, datasets), ", ".join(datasets)
            raise ConfigError(f"--exclude: {dataset}/{own[0]}: there is no training dataset {dataset!r}{hint}; data.train has: {known}")
        if missing := _missing(own, datasets[dataset]):
            near = did_you_mean(missing[0], itertools.islice(_keys(datasets[dataset]), _MAX_COMPARED_KEYS))
            more = f" (and {len(missing) - 1} more that are not there)" if len(missing) > 1 else ""
            raise ConfigError(f"--exclude: {dataset}/{missing[0]} is no sample of {dataset}{near}{more}; correct the file")


def _missing(keys: Sequence[str], dataset: ShardSet) -> list[str]:
    """Keys that no shard has, by their hashes: the keys themselves of a large dataset would take minutes to read."""
    left = {xxhash.xxh3_64_intdigest(key.encode()): key for key in keys}
    for tar in dataset.tars:
        hashes = np.fromiter(left, dtype=np.uint64, count=len(left))
        for found in hashes[np.isin(hashes, load_index(tar).key_digests)].tolist():
            del left[found]
        if not left:
            break
    return sorted(left.values())


def _keys(dataset: ShardSet) -> Iterator[str]:
    for tar in dataset.tars:
        index = load_index(tar)
        yield from (index.key(sample) for sample in range(index.num_samples))
