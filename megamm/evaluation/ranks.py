"""The processes that share one evaluation; one alone needs no group."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from megamm.core.env import rank_info


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
