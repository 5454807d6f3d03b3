"""A stretch of data that a run leaves out: its steps are planned, so that no later one shifts, and never read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from megamm.data.planning.values import as_count, as_counts, as_text


@dataclass(frozen=True, slots=True)
class Stretch:
    """Steps of data that are left out, whatever step of the run would have trained on them.

    The samples between `start` and `end` enter no ledger one by one: this record stands for them.

    Attributes:
        first: Its first step of data, from 1; steps of data are counted over the whole plan, so they go on where a run goes back.
        last: Its last one.
        start: Where it begins: first position of a window, and row of that window.
        end: Where what follows begins.
        plan: Fingerprint of the plan that it is a part of; under other data or settings it means nothing any more.
        reason: Why, in one line.
        from_step: Step that the run had reached when it went back; 0 where it did not go back.
        to_step: Step of the checkpoint that it went back to.
    """

    first: int
    last: int
    start: tuple[int, int]
    end: tuple[int, int]
    plan: str
    reason: str
    from_step: int = 0
    to_step: int = 0

    @property
    def is_rewind(self) -> bool:
        """Whether the run went back; otherwise somebody left the data out."""
        return self.from_step > 0

    def __contains__(self, step: int) -> bool:
        return self.first <= step <= self.last

    def __str__(self) -> str:
        went_back = f", from step {self.from_step} back to {self.to_step}" if self.from_step else ""
        places = f"position {self.start[0]} row {self.start[1]} to position {self.end[0]} row {self.end[1]}"
        return f"left out{went_back}: data of steps {self.first} to {self.last} ({places}): {self.reason}"

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {**asdict(self), "start": list(self.start), "end": list(self.end)}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Stretch:
        """Read what `to_json` gave; raises KeyError, TypeError or ValueError where it is something else."""
        counts = {name: as_count(value[name]) for name in ("first", "last", "from_step", "to_step")}
        texts = {name: as_text(value[name]) for name in ("plan", "reason")}
        (position, row), (end_position, end_row) = (as_counts(value[name], 2) for name in ("start", "end"))
        return cls(**{**value, **counts, **texts, "start": (position, row), "end": (end_position, end_row)})
