"""Which record goes into which shard: a pure function of the listing, the seed and the limits.

Every process and every part of a job array computes the same plan, so that a shard's number says what is in it, wherever it is written.
"""

from __future__ import annotations

import re
from array import array
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import xxhash

from megamm.core.errors import ConfigError, DataError
from megamm.data.keyed import derive_key, permute
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
    _check_splitting(splitting)
    drafts: dict[str, _SplitDraft] = {}
    sizes = np.empty(len(records), dtype=np.int64)
    keys = np.empty(len(records), dtype=np.uint64)
    found: set[str] = set()
    # One pass, because a source may make its records as they are asked for.
    for index, record in enumerate(records):
        if record.split and _wants_held_out(splitting):
            raise ConfigError(f"the source splits itself ({record.key!r} is {record.split!r}); leave --test-share and --test-list out")
        drafts.setdefault(split_of(record, splitting), _SplitDraft()).add(index, record)
        sizes[index], keys[index] = record.num_bytes, xxhash.xxh3_64_intdigest(record.key.encode())
        found |= splitting.test_names & {record.key, record.group}
    if splitting.default not in drafts and splitting.default != Splitting().default:
        raise ConfigError(
            f"--split {splitting.default} names nothing, because the source splits itself ({', '.join(sorted(drafts))}); leave it out"
        )
    _check_unique(keys, records)
    _check_names(splitting.test_names - found)
    return [_plan_split(split, drafts[split], sizes, splitting.seed, limits) for split in sorted(drafts)]


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


@dataclass
class _SplitDraft:
    """What is known of a split while the records pass by."""

    members: array[int] = field(default_factory=lambda: array("q"))
    state: xxhash.xxh3_128 = field(default_factory=xxhash.xxh3_128)

    def add(self, index: int, record: Record) -> None:
        self.members.append(index)
        self.state.update(f"{record.key} {record.num_bytes} {record.data!r}\n".encode(errors="surrogatepass"))


def check_split(split: str) -> None:
    """Refuse a name of a split with ConfigError where it cannot begin a file's name."""
    if not _SPLIT.fullmatch(split):
        raise ConfigError(f"split {split!r} cannot begin a file's name; use small letters, digits and '_'")


def _plan_split(split: str, draft: _SplitDraft, sizes: np.ndarray, seed: int, limits: Limits) -> SplitPlan:
    check_split(split)
    members = np.frombuffer(draft.members, dtype=np.int64)
    key = derive_key(seed, xxhash.xxh3_64_intdigest(split.encode()))
    order = members[permute(np.arange(len(members), dtype=np.int64), len(members), key)]
    return SplitPlan(split, order, _cut(sizes[order], limits), draft.state.hexdigest())


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


def _check_unique(digests: np.ndarray, records: Sequence[Record]) -> None:
    """Eight bytes a record instead of a set of strings; equal digests are looked at again as strings."""
    values, counts = np.unique(digests, return_counts=True)
    for value in values[counts > 1]:
        keys = [records[index].key for index in np.flatnonzero(digests == value).tolist()]
        if len(set(keys)) < len(keys):
            raise DataError(f"key {keys[0]!r} belongs to {len(keys)} records; give every sample a key of its own")


def _wants_held_out(splitting: Splitting) -> bool:
    return bool(splitting.test_share or splitting.test_names)


def _check_splitting(splitting: Splitting) -> None:
    if not 0 <= splitting.test_share < 1:
        raise ConfigError(f"--test-share {splitting.test_share} is not a share; give a number from 0 to below 1, such as 0.1")
    if _wants_held_out(splitting) and splitting.default == "test":
        raise ConfigError("--split test puts everything into the test set already; leave --test-share and --test-list out")


def _check_names(missing: Collection[str]) -> None:
    if missing:
        raise DataError(
            f"{len(missing)} names of --test-list are no key or group of the source, the first is {min(missing)!r}; "
            "they would be trained on unnoticed, so correct the list"
        )
