"""What each rank skipped since the run started or resumed, written as it happens, so that a running run can be asked.

A checkpoint holds the ledger of all ranks up to its step; these files hold what came after it. They are cut back to the step
that a run resumes at: what comes later is met again.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from megamm.core.json_lines import JsonLines, cut_back, read_json_lines
from megamm.data.ledger import Skipped


@dataclass(frozen=True, slots=True)
class SkippedAt:
    """An entry of the ledger and the step whose batch lacks it."""

    step: int
    entry: Skipped


class SkippedLog:
    """Appends to this rank's file, which exists once there is something in it. State: the open file."""

    def __init__(self, logs: Path, rank: int):
        self._lines = JsonLines(logs / f"skipped.rank_{rank:05d}.jsonl")

    def write(self, step: int, entries: Iterable[Skipped]) -> None:
        """Note what a step skipped."""
        for entry in entries:
            self._lines.write({"step": step, **entry.to_json()})

    def close(self) -> None:
        """Close the file."""
        self._lines.close()


def read_skipped(logs: Path) -> list[SkippedAt]:
    """The entries of all ranks' files, in the order of positions."""
    found = [
        SkippedAt(line.pop("step"), Skipped.from_json(line))
        for path in sorted(logs.glob("skipped.rank_*.jsonl"))
        for line in read_json_lines(path)
    ]
    return sorted(found, key=lambda one: one.entry.position)


def cut_back_skipped(logs: Path, step: int) -> None:
    """Drop what any rank noted past a step; one process does it before the ranks go on."""
    for path in sorted(logs.glob("skipped.rank_*.jsonl")):
        cut_back(path, step)
