"""The shards of a dataset as one numbered list of samples."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megamm.config import Dataset
from megamm.core.errors import DataError
from megamm.core.files import canonical_json, digest_text
from megamm.data.index import ShardFacts, check_unchanged, read_shard_facts
from megamm.data.lengths import LengthsFacts, SampleLengths, load_lengths, read_lengths_facts

IN_MEMORY_SAMPLES = 8_000_000
_MAX_RECENT = 256
_NUM_OPENERS = 8


@dataclass(frozen=True)
class ShardSet:
    """One dataset.

    Attributes:
        name: Its name in the recipe.
        tars: Its shards, sorted by path.
        starts: int64[S + 1], number of the first sample of each shard.
        digest: Of all shards and their planned lengths, in order.
        task_names: Sorted names of the tasks that occur.
        table: The planned lengths.
    """

    name: str
    tars: tuple[Path, ...]
    starts: np.ndarray
    digest: str
    task_names: tuple[str, ...]
    table: LengthTable

    @property
    def num_samples(self) -> int:
        """Samples of all shards."""
        return int(self.starts[-1])

    def locate(self, index: int) -> tuple[Path, int]:
        """Shard of a sample, and its number there."""
        shard = int(np.searchsorted(self.starts, index, side="right")) - 1
        return self.tars[shard], index - int(self.starts[shard])

    def problem(self, index: int) -> str | None:
        """Why a sample can never be used; None where planning saw nothing wrong."""
        shard = int(np.searchsorted(self.starts, index, side="right")) - 1
        return self.table.problems(shard).get(index - int(self.starts[shard]))


class LengthTable:
    """Planned lengths of a dataset's samples: whole in memory for small ones, the most recently used shards for large ones.

    Copies, not maps: every map holds a file descriptor, of which a process has few.

    Args:
        starts: int64[S + 1].
        load: Maps the lengths of a shard.
    """

    def __init__(self, starts: np.ndarray, load: Callable[[int], SampleLengths]) -> None:
        self._starts, self._load = starts, load
        self._recent: OrderedDict[int, tuple[np.ndarray, dict[int, str]]] = OrderedDict()
        self._whole: np.ndarray | None = None
        self._problems: dict[int, dict[int, str]] = {}
        if starts[-1] <= IN_MEMORY_SAMPLES:
            self._whole = np.empty((int(starts[-1]), 3), dtype=np.int32)
            for shard in range(len(starts) - 1):
                self._whole[starts[shard] : starts[shard + 1]], self._problems[shard] = self._read(shard)

    def problems(self, shard: int) -> dict[int, str]:
        """Number in a shard -> why that sample can never be used."""
        return self._shard(shard)[1] if self._whole is None else self._problems[shard]

    def gather(self, indices: np.ndarray) -> np.ndarray:
        """int32[n, 3], tokens, patches and frames of some samples (int64[n])."""
        if self._whole is not None:
            return self._whole[indices]
        shards = np.searchsorted(self._starts, indices, side="right") - 1
        order = np.argsort(shards, kind="stable")
        borders = np.flatnonzero(np.diff(shards[order], prepend=-1)).tolist()
        result = np.empty((len(indices), 3), dtype=np.int32)
        for low, high in zip(borders, [*borders[1:], len(indices)], strict=True):
            places = order[low:high]
            shard = int(shards[places[0]])
            result[places] = self._shard(shard)[0][indices[places] - self._starts[shard]]
        return result

    def _shard(self, number: int) -> tuple[np.ndarray, dict[int, str]]:
        found = self._recent.pop(number, None) or self._read(number)
        self._recent[number] = found
        if len(self._recent) > _MAX_RECENT:
            self._recent.popitem(last=False)
        return found

    def _read(self, number: int) -> tuple[np.ndarray, dict[int, str]]:
        mapped = self._load(number)
        if len(mapped.lengths) != self._starts[number + 1] - self._starts[number]:
            raise DataError(f"shard {number} of a dataset has another number of planned lengths than samples; plan its lengths again")
        return np.array(mapped.lengths), mapped.problems


def find_shards(name: str, dataset: Dataset, root: Path) -> tuple[Path, ...]:
    """Shards that a dataset's path or glob names, sorted.

    Raises:
        DataError: There are none, or one is gone whose index is still there.
    """
    pattern = Path(dataset.shards)
    base, relative = (Path(pattern.anchor), pattern.relative_to(pattern.anchor)) if pattern.is_absolute() else (root, pattern)
    tars = tuple(sorted(path for path in base.glob(str(relative)) if path.is_file()))
    if not tars:
        raise DataError(f"dataset {name}: no shard matches {base / relative}; check data.root and its `shards`, or run `megamm prepare`")
    # A glob alone would not notice a shard that went missing.
    indexed = {path.with_name(path.name.removesuffix(".index")) for path in base.glob(f"{relative}.index")}
    if gone := sorted(indexed - set(tars)):
        raise DataError(f"dataset {name}: shard {gone[0]} does not exist, but its index does; bring it back or delete {gone[0].name}.index")
    return tars


def open_dataset(name: str, dataset: Dataset, root: Path, key: str) -> ShardSet:
    """Open a dataset from the headers of its sidecars.

    Args:
        name: Its name in the recipe.
        dataset: Its shards.
        root: Folder that they are relative to.
        key: Settings of the planned lengths (`lengths_key`).

    Raises:
        DataError: A shard, an index or lengths are missing, damaged or changed; or there is no sample.
    """
    tars = find_shards(name, dataset, root)
    # Headers are tiny; on a shared file system waiting for them is all that this takes.
    with ThreadPoolExecutor(_NUM_OPENERS) as pool:
        facts = list(pool.map(lambda tar: _facts_of(tar, key), tars))
    shards, lengths = [shard for shard, _ in facts], [one for _, one in facts]
    starts = np.cumsum([0, *(one.num_samples for one in shards)], dtype=np.int64)
    if not starts[-1]:
        raise DataError(f"dataset {name}: its {len(tars)} shards hold no sample; leave the dataset out")
    return ShardSet(
        name=name,
        tars=tars,
        starts=starts,
        digest=digest_text(canonical_json([[shard.digest, one.digest] for shard, one in zip(shards, lengths, strict=True)])),
        task_names=tuple(sorted({task for one in lengths for task in one.task_names})),
        table=LengthTable(starts, lambda shard: load_lengths(tars[shard], key)),
    )


def _facts_of(tar: Path, key: str) -> tuple[ShardFacts, LengthsFacts]:
    shard = read_shard_facts(tar)
    check_unchanged(tar, shard)
    return shard, read_lengths_facts(tar, key, shard)
