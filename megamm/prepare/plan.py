"""Which record goes into which shard: a pure function of the listing, the seed and the limits.

Every process and every part of a job array computes the same plan, so that a shard's number says what is in it, wherever it is written.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import xxhash

from megamm.core.errors import ConfigError, DataError
from megamm.data.order import derive_key, permute
from megamm.prepare.source import Record

_SPLIT = re.compile(r"[a-z0-9][a-z0-9_]*")


@dataclass(frozen=True, slots=True)
class Splitting:
    """Who is held out, where the source does not say it itself.

    Attributes:
        default: Split of the records that nobody puts elsewhere.
        test_share: Share of the groups that become the split `test`, drawn by a keyed hash of the group's name.
        test_names: Keys and groups that become the split `test`.
        seed: Key of the hash.
    """

    default: str = "train"
    test_share: float = 0.0
    test_names: frozenset[str] = frozenset()
    seed: int = 0


@dataclass(frozen=True, slots=True)
class Limits:
    """When a shard is closed: samples, and bytes of their inputs (one sample alone may have more)."""

    num_samples: int = 10_000
    num_bytes: int = 1 << 30


@dataclass(frozen=True)
class SplitPlan:
    """The shards of one split. Legend: N records, S shards.

    Attributes:
        split: Its name, which the names of its shards begin with.
        order: int64[N], records in the order in which they are written.
        starts: int64[S + 1], where each shard starts in `order`.
        digest: Of its records, in the order of the listing.
    """

    split: str
    order: np.ndarray
    starts: np.ndarray
    digest: str

    @property
    def num_shards(self) -> int:
        """Shards of the split."""
        return len(self.starts) - 1

    def shard_name(self, number: int) -> str:
        """File name of a shard without its ending; names sort as numbers do."""
        return f"{self.split}-{number:0{max(5, len(str(self.num_shards - 1)))}}"

    def records(self, number: int) -> np.ndarray:
        """int64, the records of a shard in order."""
        return self.order[self.starts[number] : self.starts[number + 1]]


def make_plan(records: Sequence[Record], splitting: Splitting, limits: Limits) -> list[SplitPlan]:
    """Divide records into splits, shuffle each with a keyed permutation, and cut it into shards.

    Args:
        records: Of the source, in its own order.
        splitting: Who is held out.
        limits: When a shard is closed.

    Raises:
        ConfigError: The source splits itself and `splitting` would as well, or a split has a name that no file can have.
        DataError: There is no record, a key occurs twice, or a name that shall be held out is no record's.
    """
    if not records:
        raise DataError("the source holds no sample; look at its folder, its options and its notes")
    _check_unique(records)
    _check_held_out(records, splitting)
    members: dict[str, list[int]] = {}
    for index, record in enumerate(records):
        members.setdefault(split_of(record, splitting), []).append(index)
    for split in members:
        if not _SPLIT.fullmatch(split):
            raise ConfigError(f"split {split!r} cannot begin a file's name; use small letters, digits and '_'")
    return [_plan_split(split, members[split], records, splitting.seed, limits) for split in sorted(members)]


def split_of(record: Record, splitting: Splitting) -> str:
    """The split of a record: the source's own, `test` where it is held out, else the default."""
    if record.split:
        return record.split
    group = record.group or record.key
    if record.key in splitting.test_names or group in splitting.test_names:
        return "test"
    drawn = xxhash.xxh3_64_intdigest(group.encode(), splitting.seed) / 2**64
    return "test" if drawn < splitting.test_share else splitting.default


def read_names(path: Path) -> frozenset[str]:
    """Names of a list file, one a line.

    Raises:
        ConfigError: The file cannot be read.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--test-list {path} cannot be read ({error}); name a text file with one key or group a line") from None
    return frozenset(filter(None, map(str.strip, lines)))


def _plan_split(split: str, members: Collection[int], records: Sequence[Record], seed: int, limits: Limits) -> SplitPlan:
    numbers = np.fromiter(members, dtype=np.int64, count=len(members))
    key = derive_key(seed, xxhash.xxh3_64_intdigest(split.encode()))
    order = numbers[permute(np.arange(len(numbers), dtype=np.int64), len(numbers), key)]
    sizes = np.fromiter((records[index].num_bytes for index in order), dtype=np.int64, count=len(order))
    return SplitPlan(split, order, _cut(sizes, limits), _digest(members, records))


def _cut(sizes: np.ndarray, limits: Limits) -> np.ndarray:
    """Where shards start, so that none exceeds a limit unless one record alone does."""
    ends = np.cumsum(sizes)
    starts = [0]
    while starts[-1] < len(sizes):
        start = starts[-1]
        before = ends[start - 1] if start else 0
        by_bytes = int(np.searchsorted(ends, before + limits.num_bytes, side="right"))
        starts.append(max(start + 1, min(start + limits.num_samples, by_bytes, len(sizes))))
    return np.array(starts, dtype=np.int64)


def _digest(members: Collection[int], records: Sequence[Record]) -> str:
    state = xxhash.xxh3_128()
    for index in members:
        record = records[index]
        state.update(f"{record.key} {record.num_bytes} {record.data!r}\n".encode(errors="surrogatepass"))
    return state.hexdigest()


def _check_unique(records: Sequence[Record]) -> None:
    """Eight bytes a record instead of a set of strings; equal digests are looked at again as strings."""
    digests = np.fromiter((xxhash.xxh3_64_intdigest(record.key.encode()) for record in records), dtype=np.uint64, count=len(records))
    values, counts = np.unique(digests, return_counts=True)
    for value in values[counts > 1]:
        keys = [records[index].key for index in np.flatnonzero(digests == value)]
        if len(set(keys)) < len(keys):
            raise DataError(f"key {keys[0]!r} belongs to {len(keys)} records; give every sample a key of its own")


def _check_held_out(records: Sequence[Record], splitting: Splitting) -> None:
    wants = bool(splitting.test_share or splitting.test_names)
    if not 0 <= splitting.test_share < 1:
        raise ConfigError(f"--test-share {splitting.test_share} is not a share; give a number from 0 to below 1, such as 0.1")
    if wants and splitting.default == "test":
        raise ConfigError("--split test puts everything into the test set already; leave --test-share and --test-list out")
    if wants and (own := next((record for record in records if record.split), None)):
        raise ConfigError(f"the source splits itself ({own.key!r} is {own.split!r}); leave --test-share and --test-list out")
    known = {record.key for record in records if record.key in splitting.test_names}
    known |= {record.group for record in records if record.group in splitting.test_names}
    if missing := sorted(splitting.test_names - known):
        raise DataError(
            f"{len(missing)} names of --test-list are no key or group of the source, the first is {missing[0]!r}; "
            "they would be trained on unnoticed, so correct the list"
        )
