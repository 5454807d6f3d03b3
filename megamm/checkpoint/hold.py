"""A run held by all ranks of a job: rank 0 owns it, every rank knows the fence."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path

from megamm.checkpoint.fence import Fence
from megamm.checkpoint.lock import RunLock
from megamm.core.errors import CheckpointError
from megamm.engine.distributed import World, broadcast_json, fail_together


@dataclass(frozen=True, slots=True)
class Hold:
    """This rank's part in holding a run.

    Attributes:
        fence: What goes into every manifest.
        lock: On rank 0 only, which commits for all; None elsewhere, and where nobody contests the folder.
    """

    fence: Fence = field(default_factory=Fence)
    lock: RunLock | None = None

    def check(self) -> None:
        """Ask whether the run is still this job's; before anything of it is committed, deleted or renamed.

        Raises:
            LostRun: Another job took it over.
        """
        if self.lock is not None:
            self.lock.check()

    def started_at(self, step: int) -> None:
        """Record where this job goes on."""
        if self.lock is not None:
            self.lock.started_at(step)


@contextmanager
def hold_run(run: Path, world: World, *, lease_seconds: float) -> Iterator[Hold]:
    """Own a run until the end of the section; every rank calls it.

    Raises:
        CheckpointError: Another job owns it (on every rank); says which.
    """
    lock: RunLock | None = None
    with fail_together():
        if world.is_main:
            try:
                lock = RunLock.acquire(run, lease_seconds=lease_seconds)
            except OSError as error:
                raise CheckpointError(f"{run} cannot be locked: {error}; name a folder with --run that can be written to") from error
    fence = Fence(**broadcast_json(asdict(Fence.of_environment(lock.number)) if lock else None))
    try:
        yield Hold(fence, lock)
    finally:
        if lock is not None:
            lock.release()
