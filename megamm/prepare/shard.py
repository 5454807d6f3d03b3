"""The unit of work: one shard of the plan, kept where it is already there, else written from its records."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megamm.core.errors import DataError
from megamm.data.shards.index import load_index
from megamm.prepare.inputs import failure
from megamm.prepare.source import Draft, Record
from megamm.prepare.writer import Shard, ShardFile, sample_files

Make = Callable[[Record], Draft]


@dataclass(frozen=True, slots=True)
class Omission:
    """Something of the input that is in no shard.

    Attributes:
        key: The record's key; empty for what is no record.
        reason: Why.
        is_sample: The whole sample is missing; else a part of it.
    """

    key: str
    reason: str
    is_sample: bool

    def to_json(self) -> dict[str, str]:
        """A line of the file of omissions."""
        return {"key": self.key, "omitted": "sample" if self.is_sample else "part", "reason": self.reason}


@dataclass(frozen=True, slots=True)
class Finished:
    """What became of one shard of the plan.

    Attributes:
        name: The shard's.
        num_records: Records of the plan in it.
        shard: What was written; None where every record was skipped.
        omissions: In the order of the records.
    """

    name: str
    num_records: int
    shard: Shard | None
    omissions: tuple[Omission, ...] = ()

    @property
    def num_skipped(self) -> int:
        """Records without a sample."""
        return sum(omission.is_sample for omission in self.omissions)

    def to_json(self) -> dict[str, Any]:
        """A line of the journal."""
        shard = self.shard and [self.shard.num_samples, self.shard.num_bytes, self.shard.digest]
        omissions = [[omission.key, omission.reason, omission.is_sample] for omission in self.omissions]
        return {"name": self.name, "records": self.num_records, "shard": shard, "omissions": omissions}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Finished:
        """Read a line of the journal."""
        shard = value["shard"] and Shard(value["name"], *value["shard"])
        return cls(value["name"], value["records"], shard, tuple(Omission(*omission) for omission in value["omissions"]))


@dataclass(frozen=True, slots=True)
class Task:
    """A shard to be done.

    Attributes:
        path: Where it stands.
        records: What goes into it, in order.
        finished: What the journal says of it; None where it was never finished.
    """

    path: Path
    records: tuple[Record, ...]
    finished: Finished | None = None

    @property
    def name(self) -> str:
        """The shard's name."""
        return self.path.name.removesuffix(".tar")


def do_shard(task: Task, make: Make, advance: Callable[[int], None]) -> Finished:
    """Verify the shard where it is finished; else, or where it is damaged, write it.

    Args:
        task: The shard.
        make: Of the listing.
        advance: Told how many more records are done.

    Raises:
        DataError: Inputs cannot be read or the shard cannot be written, for a reason that lies with the machine and not with the data.
    """
    try:
        if task.finished is not None and _is_whole(task.path, task.finished.shard):
            advance(len(task.records))
            return task.finished
        return _write(task, make, advance)
    except OSError as error:
        raise DataError(
            f"shard {task.path}: {failure(error, task.path)}; put that right and run the same command again, finished shards are kept"
        ) from error


def _is_whole(path: Path, shard: Shard | None) -> bool:
    if shard is None:
        return not path.exists()
    try:
        return load_index(path, verify_digest=True).digest == shard.digest
    except DataError:
        return False


def _write(task: Task, make: Make, advance: Callable[[int], None]) -> Finished:
    omissions: list[Omission] = []
    with ShardFile(task.path) as file:
        for record in task.records:
            try:
                draft = make(record)
                files = sample_files(record.key, draft)
            except DataError as error:
                omissions.append(_omission(record.key, str(error), is_sample=True))
            else:
                file.add(record.key, files)
                omissions += [_omission(record.key, note, is_sample=False) for note in draft.notes]
            advance(1)
    return Finished(task.name, len(task.records), file.shard, tuple(omissions))


def _omission(key: str, reason: str, *, is_sample: bool) -> Omission:
    """A reason may quote anything, also bytes that were no text; the journal holds UTF-8."""
    return Omission(key, reason.encode(errors="backslashreplace").decode(), is_sample)
