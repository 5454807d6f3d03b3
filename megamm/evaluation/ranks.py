"""The processes that share one evaluation; one alone needs no group."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megamm.core.env import rank_info
from megamm.inference.load import CHECKPOINTS, newest_checkpoint


@dataclass(frozen=True, slots=True)
class Ranks:
    """This process among those that a launcher started.

    Attributes:
        rank: Of this process.
        size: How many there are.
    """

    rank: int
    size: int

    @classmethod
    def join(cls) -> Ranks:
        """Meet the others; every rank calls it."""
        info = rank_info()
        if info.world_size > 1:
            from megamm.engine import distributed

            distributed.start()
        return cls(info.rank, info.world_size)

    @property
    def is_main(self) -> bool:
        """True on the rank that has the report."""
        return self.rank == 0

    def first(self, value: Any) -> Any:
        """Rank 0's JSON value on every rank; every rank waits here."""
        if self.size == 1:
            return value
        from megamm.engine.distributed import broadcast_json

        return broadcast_json(value)

    def fail_together(self) -> AbstractContextManager[Any]:
        """A block that fails on every rank where it fails on one; every rank enters it."""
        if self.size == 1:
            return nullcontext()
        from megamm.engine.distributed import fail_together

        return fail_together()

    def one_checkpoint(self, source: Path) -> Path:
        """What all ranks load of a source: a run that still trains may commit between one rank's look for the newest and another's.

        Raises:
            CheckpointError: The run has no good checkpoint (on every rank).
        """
        if self.size == 1 or not (source / CHECKPOINTS).is_dir():
            return source
        with self.fail_together():
            newest = str(newest_checkpoint(source)) if self.is_main else ""
        return Path(self.first(newest))

    def wait(self) -> None:
        """Until every rank is here."""
        if self.size > 1:
            from megamm.engine.distributed import barrier

            barrier()

    def leave(self) -> None:
        """Part from the others, all together."""
        if self.size > 1:
            from megamm.engine import distributed

            distributed.stop()
