"""Whether the owner of a run lives, as far as files of the run and this machine can tell. Nothing is locked or touched."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

from megamm.checkpoint.fence import newest_owner
from megamm.checkpoint.lock import Owner, is_gone_from_here, lease_path, read_owner
from megamm.core.errors import CheckpointError

# Clocks of this machine and of the file server differ by a little; a lease moves twelve times before it runs out.
_LEASES = 2


@dataclass(frozen=True, slots=True)
class Owning:
    """The newest owner of a run.

    Attributes:
        number: Its number.
        owner: Who it is.
        silent_seconds: Since its lease moved last, by this machine's clock and the file system's.
        is_gone: Its process ran on this machine and does no more.
    """

    number: int
    owner: Owner
    silent_seconds: float
    is_gone: bool

    @property
    def is_fresh(self) -> bool:
        """Whether it holds the run and its lease moves; the scheduler may know better."""
        return not self.owner.is_released and not self.is_gone and self.silent_seconds <= _LEASES * self.owner.lease_seconds

    @property
    def has_begun(self) -> bool:
        """Whether it went on from a step already."""
        return bool(self.owner.starts) and self.owner.starts[-1][0] == self.number

    @property
    def began_at_step(self) -> int:
        """Where the last owner that trained went on."""
        return self.owner.starts[-1][1] if self.owner.starts else 0

    @property
    def num_restarts(self) -> int:
        """How often the run was gone on with."""
        return max(0, len(self.owner.starts) - 1)


def read_owning(run: Path) -> Owning | None:
    """The newest owner of a run; None where it never had one.

    Raises:
        CheckpointError: What the lock says cannot be read.
    """
    for _ in range(3):
        number = newest_owner(run)
        if not number:
            return None
        try:
            owner = read_owner(run, number)
            silent_seconds = max(0.0, time.time() - lease_path(run, number).stat().st_mtime)
        except (CheckpointError, FileNotFoundError):
            if newest_owner(run) == number:
                raise
            # The next owner has swept it away in the meantime.
            continue
        return Owning(number, owner, silent_seconds, is_gone_from_here(owner))
    return None
