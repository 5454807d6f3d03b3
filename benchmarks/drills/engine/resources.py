"""What processes hold: memory, open files, shared memory; and whether it grows."""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import psutil

_MIB = 1 << 20
_SHARED = Path("/dev/shm")


@dataclass(frozen=True, slots=True)
class Holding:
    """What some processes held together at a moment.

    Attributes:
        seconds: On the clock of `time.monotonic`.
        resident_bytes: Memory of theirs that is in use.
        num_files: Open file descriptors.
        shared_bytes: Anonymous shared memory, as large as it was made, through whatever descriptors.
        num_threads: Threads.
    """

    seconds: float
    resident_bytes: int
    num_files: int
    shared_bytes: int
    num_threads: int

    @classmethod
    def of(cls, pids: Iterable[int]) -> Holding | None:
        """Look at processes; None where one of them is gone."""
        resident = files = threads = 0
        shared: dict[int, int] = {}
        try:
            for process in map(psutil.Process, pids):
                resident += process.memory_info().rss
                threads += process.num_threads()
                descriptors = list(Path(f"/proc/{process.pid}/fd").iterdir())
                files += len(descriptors)
                shared |= dict(_anonymous(descriptors))
        except (psutil.NoSuchProcess, FileNotFoundError, ProcessLookupError):
            return None
        return cls(time.monotonic(), resident, files, sum(shared.values()), threads)


def _anonymous(descriptors: Iterable[Path]) -> Iterable[tuple[int, int]]:
    """(inode, size) of what `memfd_create` made; a descriptor may be closed while it is looked at."""
    for descriptor in descriptors:
        try:
            if str(descriptor.readlink()).startswith("/memfd:"):
                facts = descriptor.stat()
                yield facts.st_ino, facts.st_size
        except FileNotFoundError:
            continue


def shared_names() -> set[str]:
    """Names in the shared memory of this machine; others may add theirs at any time."""
    return {path.name for path in _SHARED.iterdir() if _is_own(path)} if _SHARED.is_dir() else set()


def _is_own(path: Path) -> bool:
    try:
        return path.stat().st_uid == os.getuid()
    except FileNotFoundError:
        return False


@dataclass(frozen=True, slots=True)
class Growth:
    """How much more was held in the last quarter of a time than in its second one, medians of both.

    Attributes:
        minutes: Between the middles of both quarters.
        resident_mib: Memory.
        num_files: File descriptors.
        shared_mib: Anonymous shared memory.
        num_threads: Threads.
    """

    minutes: float
    resident_mib: float
    num_files: float
    shared_mib: float
    num_threads: float

    @classmethod
    def over(cls, holdings: Sequence[Holding]) -> Growth:
        """The first quarter is left out: what a program loads once is no leak."""
        quarter = len(holdings) // 4
        early, late = holdings[quarter : 2 * quarter], holdings[-quarter:]

        def more(name: str) -> float:
            return median(getattr(one, name) for one in late) - median(getattr(one, name) for one in early)

        return cls(
            more("seconds") / 60,
            more("resident_bytes") / _MIB,
            more("num_files"),
            more("shared_bytes") / _MIB,
            more("num_threads"),
        )

    def problems(self, *, max_resident_mib: float) -> list[str]:
        """What grew more than a program that repeats itself may."""
        limits = {"resident_mib": max_resident_mib, "num_files": 2.0, "shared_mib": 0.0, "num_threads": 2.0}
        return [
            f"{name} grew by {getattr(self, name):.1f} in {self.minutes:.1f} minutes"
            for name in limits
            if getattr(self, name) > limits[name]
        ]

    def __str__(self) -> str:
        return (
            f"memory {self.resident_mib:+.1f} MiB, files {self.num_files:+g}, shared memory {self.shared_mib:+g} MiB, "
            f"threads {self.num_threads:+g} in {self.minutes:.1f} minutes"
        )
