"""What a drill is, and how its tries are counted."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeAlias

Size: TypeAlias = Literal["quick", "normal", "full"]
"""How much of a drill is run: `quick` takes seconds, `normal` fills the table, `full` adds what takes very long."""


@dataclass(frozen=True, slots=True)
class Tally:
    """What became of the tries of one fault.

    Attributes:
        tries: How often it was put.
        survived: Tries that ended as they should.
        lost: Tries that ended in any other way: torn, wrong, unnoticed, stuck, with something left behind.
        note: What a reader of the table should know: how, or the first loss.
    """

    tries: int
    survived: int
    lost: int
    note: str = ""

    def __post_init__(self) -> None:
        if self.survived + self.lost != self.tries:
            raise ValueError(f"{self.survived} survived and {self.lost} lost are not {self.tries} tries")

    @classmethod
    def of(cls, problems: Iterable[str], note: str = "") -> Tally:
        """Count tries, each given by what went wrong with it; empty for one that survived. The first loss goes into the note."""
        problems = list(problems)
        losses = [problem for problem in problems if problem]
        notes = [note] * bool(note) + [f"first loss: {loss}" for loss in losses[:1]]
        return cls(len(problems), len(problems) - len(losses), len(losses), "; ".join(notes))


@dataclass(frozen=True, slots=True)
class Drill:
    """One fault of the table.

    Attributes:
        fault: Its name, unique in the table, in words.
        run: Puts it, with a folder of its own for what it writes; deleted afterwards.
        needs_engine: It starts ranks with DeepSpeed, which takes minutes rather than seconds.
    """

    fault: str
    run: Callable[[Size, Path], Tally]
    needs_engine: bool = False
