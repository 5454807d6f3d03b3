"""What a raw source says of itself: which records it has, and how one record becomes a sample.

Everything else (order, shards, processes, resuming, parts, reports) is written once, for all sources.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass(frozen=True, slots=True)
class Record:
    """One sample to be, known before its files are read.

    Attributes:
        key: Its sample key, unique in the source (see `megamm.prepare.names.plain_key`).
        num_bytes: Bytes of its inputs, by which shards are cut.
        data: What `Listing.make` needs of it; small, picklable, and with a `repr` that tells it from others.
        split: Where the source itself puts it; empty leaves that to the command.
        group: Records of a group stay on one side of a split; the key where empty.
    """

    key: str
    num_bytes: int
    data: Any
    split: str = ""
    group: str = ""


@dataclass(frozen=True, slots=True)
class Draft:
    """A sample before it is checked and written.

    Attributes:
        document: Content of `KEY.json`.
        members: Member suffix, such as `0.png`, to its bytes.
        notes: What of the input is not in it, and why.
    """

    document: Mapping[str, Any]
    members: Mapping[str, bytes] = field(default_factory=dict)
    notes: Sequence[str] = ()


@dataclass(frozen=True, slots=True)
class Listing:
    """What a source holds under some settings.

    Attributes:
        records: In an order that depends on the input alone.
        make: Reads a record's files and returns its sample; a function, or a `functools.partial` of one with keywords whose `repr` tells
            them from others, picklable because other processes call it. A `DataError` that it raises skips the record with that
            reason; an `OSError` ends the command, because the data is not to blame for it.
        notes: What of the input is no record, and why.
        files: Name -> content of what lies beside the shards and belongs to no sample, such as the list of a shop's items.
    """

    records: Sequence[Record]
    make: Callable[[Record], Draft]
    notes: Sequence[str] = ()
    files: Mapping[str, bytes] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Option:
    """One setting of a source: a keyword of its `records` and a flag of its command.

    Attributes:
        name: The keyword; the flag is `--` and the name with dashes.
        help: One line.
        read: Reads the flag's word. An option read as a `Path` says where inputs lie, and not what they are.
        default: The value without the flag.
        metavar: What stands for the word in the help.
        is_repeated: The flag may be given several times; its value is a tuple.
    """

    name: str
    help: str
    read: Callable[[str], Any] = str
    default: Any = ""
    metavar: str = ""
    is_repeated: bool = False

    @property
    def flag(self) -> str:
        """As typed on the command line."""
        return "--" + self.name.replace("_", "-")


@dataclass(frozen=True, slots=True)
class Source:
    """A kind of raw data.

    Attributes:
        name: As typed after `megamm prepare`.
        help: One line.
        records: Called with the options as keywords, and with `input: Path` where the source takes one.
        input: What INPUT is, in one line; empty where the source needs none.
        options: The settings that `records` takes.
        samples_a_shard: Samples after which a shard is closed, unless the command says otherwise.
    """

    name: str
    help: str
    records: Callable[..., Listing]
    input: str = ""
    options: tuple[Option, ...] = ()
    samples_a_shard: int = 10_000


def one_of(*words: str) -> Callable[[str], str]:
    """Reads an option that is one of some words."""

    def read(word: str) -> str:
        if word not in words:
            raise ValueError(f"{word!r} is none of {', '.join(words)}")
        return word

    return read


def count(word: str) -> int:
    """Reads an option that is a number of at least 1."""
    if not word.isdecimal() or int(word) < 1:
        raise ValueError(f"{word!r} is not a whole number of at least 1")
    return int(word)


SEED = Option("seed", "seeds the order, the share that is held out and what is rendered (default 0)", int, 0, "N")
TASK = Option("task", "name of the task", metavar="NAME")
PROMPT = Option("prompt", "what the user asks (default: the task's own question)", metavar="TEXT")
ANSWERS = Option("answers", "keep (default), or drop: samples without answers, which need none", one_of("keep", "drop"), "keep", "WHAT")
ROOT = Option("root", "folder that the paths of media are relative to (default: that of INPUT)", Path, None, "DIR")


def default_prompt(task: str) -> str:
    """The question of a task, where `megamm.tasks` has one; else nothing."""
    from megamm.tasks import TASKS

    return TASKS[task].prompt if task in TASKS else ""
